"""What a TensorBoard server shows of a finished run. Truth: its own HTTP API."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import selftune as st

NAMES = ["lr", "beta1", "weight_decay"]


def run(folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False, **options)
    tuner.fit(batches[:12], batches[12:], epochs=10, progress=False, log_dir=folder, log_every=10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server over two runs, one of which tunes an l1 penalty too."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "plain run")
    run(folder / "with l1", hparams={"l1": 1e-4})
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    told, until = folder / "told.txt", time.monotonic() + 60
    with told.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        found = None
        while found is None and time.monotonic() < until:
            time.sleep(0.2)
            found = re.search(r"http://\S+", told.read_text())
        assert found is not None, told.read_text()
        address = found[0].rstrip("/")
        while len(get(address, "scalars/tags")) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


def get(address: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{address}/data/plugin/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


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
