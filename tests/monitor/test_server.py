"""What a TensorBoard server shows of a finished run. Truth: its own HTTP API."""

from boards import get

NAMES = ["lr", "beta1", "weight_decay"]


def test_every_documented_tag_is_listed(server: str) -> None:
    tags = set(get(server, "scalars/tags")["plain run"])
    want = {"Loss/train", "Loss/val", "Loss/gap", "outer/averaged-vs-last", "time/overhead"}
    want |= {"response/predicted", "response/realised", "response/agreement"}
    want |= {"Loss/final", "log10/lr", "log10/weight_decay", "when/lr", "when/beta1"}
    for name in NAMES:
        want |= {f"hyper/{name}"}
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
        assert {"Loss/final", "hyper/lr"} <= metrics
        assert group["hparams"]["start/lr"] > 0


def test_custom_scalars_have_a_page_a_family(server: str) -> None:
    pages = {page["title"]: page for page in get(server, "custom_scalars/layout")["category"]}
    assert {"Loss", "Rates and momenta", "Regularization", "Health"} <= set(pages)
    charts = {chart["title"]: chart for chart in pages["Rates and momenta"]["chart"]}
    values, events = charts["lr (log10), events marked"]["margin"]["series"]
    assert values == {
        "value": "log10/lr", "lower": "margin/lr/low", "upper": "margin/lr/high"
    }  # fmt: skip
    assert set(events.values()) == {"when/lr"}


def test_charts_are_the_same_in_every_run(server: str) -> None:
    """Law: runs that tune the same and more share their charts; none is listed twice."""
    for page in get(server, "custom_scalars/layout")["category"]:
        titles = [chart["title"] for chart in page["chart"]]
        assert len(set(titles)) == len(titles), page["title"]


def test_groups_of_tags_open_with_losses_and_hyperparameters(server: str) -> None:
    """Truth: TensorBoard sorts groups by character codes, and opens the first two."""
    groups = sorted({tag.split("/")[0] for tag in get(server, "scalars/tags")["with l1"]})
    assert groups[:2] == ["Loss", "hyper"]
    assert groups[-3:] == ["time", "weights", "when"]


def test_the_final_loss_is_the_first_metric(server: str) -> None:
    metrics = get(server, "hparams/experiment", {})["metricInfos"]
    assert metrics[0]["name"]["tag"] == "Loss/final"
