"""The charts of hyperparameters with margins. Law: value, low and high have the same steps."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from boards import laid_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.monitor import InMemory
from selftune.monitor.reading import read

Batch = tuple[Tensor, Tensor]


def job() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    x = torch.randn(160, 4)
    return nn.Linear(4, 1), [(part, part.sum(1, keepdim=True)) for part in x.split(16)]


def steps(log: InMemory, tag: str) -> list[int]:
    return [row.step for row in log.rows if row.tag == tag]


def assert_drawn(log: InMemory) -> None:
    for name in ("lr", "beta1", "weight_decay"):
        at = steps(log, f"hyper/{name}")
        assert at
        if name != "beta1":  # drawn as log10
            assert steps(log, f"log10/{name}") == at
        for end in ("low", "high"):
            assert steps(log, f"margin/{name}/{end}") == at, (name, end)


def test_of_a_tuner_with_a_sweep() -> None:
    model, batches = job()
    log = InMemory()
    tuner = st.Tuner(model, F.mse_loss, compile=False)
    tuner.fit(batches[:8], batches[8:], steps=120, log_every=1, recorder=log, progress=False)
    assert_drawn(log)


def test_of_an_optimizer() -> None:
    model, batches = job()
    log = InMemory()
    opt = st.AdamW(model, total_steps=120, log_dir=log)
    for step in range(120):
        x, y = batches[step % 8]
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        opt.step()
        opt.hyper_step(lambda: F.mse_loss(model(batches[8][0]), batches[8][1]))
    opt.finish()
    assert_drawn(log)


# event files, as TensorBoard reads them


def tuner(steps: int, folder: Path, **options: Any) -> None:
    model, batches = job()
    tuner = st.Tuner(model, F.mse_loss, compile=False)
    tuner.fit(batches[:8], batches[8:], steps=steps, log_dir=folder, progress=False)


def optimizer(steps: int, folder: Path, split: bool = False, **options: Any) -> None:
    model, batches = job()
    groups = [{"params": [p], "lr": 1e-2 / (i + 1)} for i, p in enumerate(model.parameters())]
    params = groups if split else model.parameters()
    opt = st.AdamW(params, total_steps=steps, log_dir=folder, **options)
    for step in range(steps):
        x, y = batches[step % 8]
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: F.mse_loss(model(batches[8][0]), batches[8][1]))
    opt.finish()


def curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: ([e.step for e in es], [e.value for e in es]) for tag, es in found.items()}


@pytest.mark.parametrize("steps", [60, 300, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("face", [tuner, optimizer])
def test_every_chart_of_the_layout_draws(face: Any, steps: int, tmp_path: Path) -> None:
    face(steps, tmp_path)
    assert_charts_draw(tmp_path)
    found = curves(tmp_path)
    losses = found["Loss/train"][1]
    assert len(losses) >= 5
    assert all(map(math.isfinite, losses))
    assert len(found["Loss/val"][0]) >= 5


@pytest.mark.parametrize("options", [{"split": True}, {"per": "group", "split": True}])
def test_charts_draw_where_groups_differ(options: dict[str, Any], tmp_path: Path) -> None:
    optimizer(300, tmp_path, **options)
    assert_charts_draw(tmp_path)
    found = curves(tmp_path)
    assert "hyper/lr/1" in found
    lines = read(tmp_path).lines()
    names = [line.name for line in lines]
    assert names.count("lr/0") == names.count("lr/1") == names.count("lr") == 1
    sentences = {line.name: line.verdict for line in lines}
    assert sentences["lr"].startswith("lr ")  # the verdict is that of their representative
    assert sentences["lr/0"] == sentences["lr/1"] == "lr of a group or layer"


def assert_charts_draw(folder: Path) -> None:
    """Law of TensorBoard: every tag exists; value, lower and upper end have the same steps."""
    found = curves(folder)
    titles = {}
    for page in laid_out(folder).category:
        titles[page.title] = [chart.title for chart in page.chart]
        for chart in page.chart:
            for pattern in chart.multiline.tag:
                (tag,) = (t for t in found if re.match(pattern, t))
                assert found[tag][0], chart.title
            for series in chart.margin.series:
                if series.value.startswith("when/") and series.value not in found:
                    continue  # nothing happened: the chart draws the value
                at, low, high = (found[t][0] for t in (series.value, series.lower, series.upper))
                assert at == low == high, chart.title
                assert at
    assert {"Loss", "Health"} <= set(titles)
    assert sorted(titles["Rates and momenta"]) == [
        "beta1, events marked",
        "lr (log10), events marked",
    ]
    assert titles["Regularization"] == ["weight_decay (log10)"]
