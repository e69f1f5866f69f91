"""What a TensorBoard server shows of a finished run. Truth: its own HTTP API."""

from boards import get

NAMES = ["lr", "beta1", "weight_decay"]


def test_every_documented_tag_is_listed(server: str) -> None:
    tags = set(get(server, "scalars/tags")["plain run"])
    want = {"train/loss", "val/loss", "gap/val-train", "outer/averaged-vs-last", "cost/overhead"}
    want |= {"response/predicted", "response/realised", "response/agreement"}
    want |= {"final/loss", "score/loss"}
    for name in NAMES:
        want |= {f"hyper/{name}", f"verdict/{name}", f"end/{name}"}
        want |= {f"hypergrad/{name}/{kind}" for kind in ("value", "norm", "snr")}
        want |= {f"margin/{name}/low", f"margin/{name}/high"}
    assert want <= tags
    assert "verdicts/text_summary" in get(server, "text/tags")["plain run"]


def test_sessions_have_the_union_of_columns(server: str) -> None:
    columns = {c["name"] for c in get(server, "hparams/experiment", {})["hparamInfos"]}
    assert {f"start/{n}" for n in [*NAMES, "l1"]} <= columns
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    asked = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": statuses, "colParams": []}
    groups = get(server, "hparams/session_groups", asked)["sessionGroups"]
    assert sorted(g["name"] for g in groups) == ["plain run", "with l1"]
    for group in groups:
        (session,) = group["sessions"]
        assert session["status"] == "STATUS_SUCCESS"
        metrics = {m["name"]["tag"] for m in session["metricValues"]}
        assert {"final/loss", "end/lr"} <= metrics
        assert group["hparams"]["start/lr"] > 0


def test_custom_scalars_have_a_page_a_family(server: str) -> None:
    pages = {page["title"]: page for page in get(server, "custom_scalars/layout")["category"]}
    assert {"Loss", "Step", "Regularization", "Health"} <= set(pages)
    charts = {chart["title"]: chart for chart in pages["Step"]["chart"]}
    series = charts["lr"]["margin"]["series"][0]
    assert series == {
        "value": "hyper/lr", "lower": "margin/lr/low", "upper": "margin/lr/high"
    }  # fmt: skip
