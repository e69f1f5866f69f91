"""Memory across tasks. Truths: weighted means by hand, the laws of rates and batches."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune import search
from selftune.hparams import MOMENTUM

TASK = search.Task(
    kind="table", task="regression", examples=500, inputs=8, outputs=1, steps=1000, batch=32
)


def other(**changes: Any) -> search.Task:
    return dataclasses.replace(TASK, **changes)


def test_a_start_is_the_weighted_mean_in_raw_space(tmp_path: Path) -> None:
    memory = search.Memory(tmp_path)
    memory.remember(TASK, {"lr": 0.1, "momentum": 0.99}, value=1.0)
    memory.remember(other(examples=1000), {"lr": 0.001}, value=1.0)
    weight = math.exp(-(math.log(2) ** 2 / 4) / 2)  # one of four sizes is twice as large
    logs = 0.2 * math.log(0.01) + math.log(0.1) + weight * math.log(0.001)
    found = memory.start(TASK, {"lr": 0.01, "momentum": 0.9, "l1": 0.5}, {"momentum": MOMENTUM})
    assert found["lr"] == pytest.approx(math.exp(logs / (1.2 + weight)))
    memories = (0.2 * math.log(10) + math.log(100)) / 1.2  # logs of 1/(1 − μ)
    assert found["momentum"] == pytest.approx(1 - math.exp(-memories))
    assert found["l1"] == 0.5  # nobody knows


def test_what_is_unlike_counts_little(tmp_path: Path) -> None:
    memory = search.Memory(tmp_path)
    memory.remember(other(kind="images", task="classification"), {"lr": 1.0}, value=1.0)
    memory.remember(other(rule="SGD"), {"lr": 10.0}, value=1.0)  # not comparable at all
    assert memory.start(TASK, {"lr": 0.01})["lr"] == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(("rule", "power"), [("SGD", 1.0), ("AdamW", 0.5)])
def test_rates_move_with_the_batch(rule: str, power: float) -> None:
    """Laws: linear or square root far below the noise scale, constant far above it."""
    here, there = other(rule=rule, batch=64), other(rule=rule, batch=16)
    assert here.rate_from(there) == pytest.approx(4**power)
    quiet, loud = (dataclasses.replace(here, noise=n) for n in (1e-3, 1e6))
    assert quiet.rate_from(there) == pytest.approx(1.0, rel=1e-3)
    assert loud.rate_from(there) == pytest.approx(4**power, rel=1e-3)
    assert here.rate_from(there) * there.rate_from(here) == pytest.approx(1.0)


def test_batches_move_with_the_device() -> None:
    assert search.batch_for(64, 8, 32) == 256
    assert search.batch_for(64, 32, 8) == 16
    assert search.batch_for(64, 8, 32, noise=10) == 64
    assert search.batch_for(4, 1000, 1) == 1


def test_files_that_are_broken_are_left_out(tmp_path: Path) -> None:
    memory = search.Memory(tmp_path)
    memory.remember(TASK, {"lr": 0.1}, value=1.0)
    (tmp_path / "broken.json").write_text('{"task": {"kind')
    (tmp_path / "foreign.json").write_text("[1, 2]")
    assert len(memory.runs()) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, not a file"):
        search.Memory(tmp_path / "file")


def test_a_search_begins_with_what_was_chosen_and_adds_to_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(32), x.sum(1, keepdim=True).split(32), strict=True))
    memory = search.Memory(tmp_path)

    def build(space: search.Space) -> nn.Module:
        width = space.suggest_int("width", 1, 1000)
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))

    options: dict[str, Any] = dict(
        steps=40, trials=2, sampler="random", pruner=None, loss_fn=F.mse_loss, memory=memory,
        progress=False, tuner=dict(compile=False, probe=False),
    )  # fmt: skip
    first = search.select(build, batches[:6], batches[6:], **options)
    (entry,) = memory.runs()
    assert entry["params"] == first.params
    assert entry["hparams"] == pytest.approx(first.hparams)
    assert entry["schedule"]["steps"] == 40
    second = search.select(build, batches[:6], batches[6:], seed=5, **options)
    assert second.study.trials[0].params == first.params
    assert len(memory.runs()) == 2


def test_a_tuner_starts_from_it(tmp_path: Path) -> None:
    memory = search.Memory(tmp_path)
    memory.remember(TASK, {"lr": 0.02, "weight_decay": 0.3, "beta2": 0.5}, value=1.0)
    tuner = st.Tuner(nn.Linear(8, 1), F.mse_loss, probe=False, compile=False)
    taken = tuner.start_from(memory.start(TASK, tuner.starts, tuner.scales))
    assert set(taken) == set(tuner.starts)  # all it tunes, and not beta2
    assert 0.001 < tuner.starts["lr"] < 0.02
    batches = [(torch.randn(8, 8), torch.randn(8, 1))] * 2
    result = tuner.fit(batches, batches, steps=5, progress=False)
    assert result.history["weight_decay"][0] == pytest.approx(tuner.starts["weight_decay"])
    with pytest.raises(RuntimeError, match="after fit"):
        tuner.start_from({"lr": 0.1})
    with pytest.raises(ValueError, match="must be finite"):
        st.Tuner(nn.Linear(8, 1), F.mse_loss).start_from({"lr": math.nan})


def test_what_another_space_has_chosen_is_not_tried(tmp_path: Path) -> None:
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
    batches = list(zip(x.split(32), x.sum(1, keepdim=True).split(32), strict=True))
    memory = search.Memory(tmp_path)
    options: dict[str, Any] = dict(
        steps=10, trials=1, sampler="random", pruner=None, loss_fn=F.mse_loss, memory=memory,
        progress=False, tuner=dict(compile=False, probe=False),
    )  # fmt: skip

    def build(most: int) -> Any:
        def network(space: search.Space) -> nn.Module:
            width = space.suggest_int("width", most - 9, most)
            return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))

        return network

    def linear(space: search.Space) -> nn.Module:
        return nn.Linear(4, 1)

    search.select({"a": build(100), "b": linear}, batches[:3], batches[3:], **options)
    search.select({"c": build(10), "d": linear}, batches[:3], batches[3:], **options)
    search.select(build(100), batches[:3], batches[3:], **options)
    found = search.select(build(10), batches[:3], batches[3:], **options)
    assert all(t.state.name == "COMPLETE" for t in found.study.trials)
    assert 1 <= found.params["width"] <= 10


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "memory= compares data sets: pass train="),
        ([{"x": torch.ones(2, 4), "y": torch.ones(2, 1)}], "memory= needs batches .*not dict"),
    ],
)
def test_a_memory_needs_pairs(tmp_path: Path, train: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search.select(
            lambda s: nn.Linear(4, 1), train, train, memory=search.Memory(tmp_path), steps=5,
            loss_fn=F.mse_loss, progress=False,
        )  # fmt: skip
