"""Events in the charts of what they set. Truths: explain(), warnings, TensorBoard's own reader."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from boards import laid_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune.monitor import InMemory, Row, TensorBoard

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


def trained(log: Any, steps: int = 300, spoilt: int = -1, first: int = 0, **options: Any) -> Any:
    """A loop; its weights are multiplied by 100 at a step, and it tunes from the first step on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    opt = st.AdamW(net.parameters(), lr=1e-5, total_steps=steps, log_dir=log, **options)
    for step in range(steps):
        if step == spoilt:
            with torch.no_grad():
                [p.mul_(100.0) for p in net.parameters()]
        x = X[32 * (step % 6) :][:32]
        opt.zero_grad()
        loss = F.mse_loss(net(x), x[:, :3].abs())
        loss.backward()
        opt.step()
        opt.report(loss)
        if step >= first:
            opt.hyper_step(lambda: F.mse_loss(net(X[192:]), X[192:, :3].abs()))
    opt.finish()
    return opt


def test_sweep_and_rewinds_are_marked_where_they_set_the_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = InMemory()
    opt = trained(log, spoilt=200)
    steps, heights = log.curve("when/lr")
    assert (steps[0], heights[0]) == (0, -5.0)
    swept = re.search(r"sweep (\S+)", opt.explain())
    assert swept is not None
    assert f"{10 ** heights[1]:.3g}" == swept[1]
    warned = [r.getMessage() for r in caplog.records if "last good weights" in r.getMessage()]
    assert re.findall(r"step (\d+):", warned[0]) == [str(steps[2])]
    assert len(steps) - 2 == log.curve("weights/rewinds")[1][-1]
    # beta1, on its own scale: given, and after the sweep; a rewind does not change it
    assert log.curve("when/beta1")[0] == steps[:2]
    assert log.curve("when/beta1")[1][0] == 0.9
    assert not log.curve("when/weight_decay")[0], "neither sets it"


@pytest.mark.parametrize("tuned", [("lr",), ("weight_decay",)])
def test_without_a_sweep_nothing_is_marked(tuned: tuple[str, ...]) -> None:
    log = InMemory()
    trained(log, 60, tune=tuned, probe=False)
    assert not [row for row in log.rows if row.tag.startswith("when/")]


def test_an_extension_is_marked(tmp_path: Path) -> None:
    def fit(steps: int, log: InMemory) -> Any:
        torch.manual_seed(0)
        batches = [(x, x[:, :3].abs()) for x in X.split(16)]
        tuner = st.Tuner(nn.Linear(8, 3), F.mse_loss, hparams={"lr": 1e-3}, compile=False)
        return tuner.fit(
            batches[:12], batches[12:], steps=steps, log_dir=tmp_path, recorder=log, resume=True,
            progress=False,
        )  # fmt: skip

    fit(60, InMemory())
    log = InMemory()
    fit(120, log)
    steps, heights = log.curve("when/lr")
    assert steps[0] == 60
    assert heights[0] == pytest.approx(log.curve("log10/lr")[1][0])
    # The layout that the resumed run keeps has the charts of the whole run.
    titles = charts(tmp_path)
    assert {"lr (log10), events marked", "beta1, events marked", "weight_decay (log10)"} <= titles


def charts(folder: Path) -> set[str]:
    """Titles of the custom scalars' charts, in the last layout of a log."""
    return {chart.title for page in laid_out(folder).category for chart in page.chart}


def test_the_layout_has_a_chart_as_soon_as_it_draws_something(tmp_path: Path) -> None:
    log = TensorBoard(tmp_path)
    log.begin({"lr": 0.1}, ["lr"])
    log.scalars([Row("Loss/val", 1.0, 1)])
    assert charts(tmp_path) == {"loss of validation batches"}
    log.scalars([Row("Loss/train", 1.0, 2), Row("Loss/val", 1.0, 2)])
    assert charts(tmp_path) == {"loss of validation batches", "loss of training batches"}
    again = TensorBoard(tmp_path)  # a resumed run, which has logged one of them so far
    again.resume(2)
    again.scalars([Row("time/overhead", 0.1, 3)])
    assert len(charts(tmp_path)) == 3


def test_events_are_points_and_codes_no_curves(tmp_path: Path) -> None:
    log = TensorBoard(tmp_path)
    log.scalars([Row("when/lr", -3.0, 0), Row("when/lr", -2.0, 14), Row("verdict/lr", 2.0, 20)])
    log.end("finished")
    read = EventAccumulator(str(tmp_path)).Reload()
    assert read.Tags()["scalars"] == ["when/lr"]
    found = [(e.step, e.value) for e in read.Scalars("when/lr")]
    assert found[::2] == [(0, -3.0), (14, -2.0)]
    assert [s for s, _ in found[1::2]] == [1, 15]
    assert all(math.isnan(v) for _, v in found[1::2]), "a line does not join two events"
    assert st.monitor.reading.read(tmp_path).curves["verdict/lr"] == ([20], [2.0])


def test_starts_are_those_given_also_where_tuning_begins_late(tmp_path: Path) -> None:
    trained(tmp_path, 60, first=30)
    data = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(data["_hparams_/session_start_info"])
    found = {n: v.number_value for n, v in start.hparams.items()}
    assert found["start/lr"] == 1e-5
    assert found["start/beta1"] == 0.9


def test_the_final_loss_of_an_optimizer_by_hand() -> None:
    """By hand: the mean of the last five validation losses."""
    log = InMemory()
    trained(log, 120)
    losses = log.curve("Loss/val")[1]
    assert log.curve("Loss/final")[1][-1] == pytest.approx(sum(losses[-5:]) / 5)
