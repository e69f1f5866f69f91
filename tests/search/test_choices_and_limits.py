"""Choices of any kind, data without an end, time limits, and masked outputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from sqlalchemy.exc import OperationalError
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from selftune import search

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=GENERATOR)
LABELS = (X[:, 0] > 0).long()

CHOICES: dict[str, tuple[Any, ...]] = {
    "tuples": ((4,), (8, 4)),
    "classes": (nn.ReLU, nn.Tanh),
    "two of one name": (lambda: nn.ReLU(), lambda: nn.Tanh()),
    "objects": (nn.ReLU(), object()),
}


@pytest.mark.parametrize("choices", list(CHOICES))
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
@pytest.mark.parametrize("stored", [False, True])
def test_choices_of_any_kind(choices: str, sampler: str, stored: bool, tmp_path: Path) -> None:
    """Law: the builder gets what was offered, also in a search that goes on."""
    given: list[Any] = []

    def build(space: Any) -> nn.Module:
        given.append(space.suggest_categorical("choice", CHOICES[choices]))
        return nn.Linear(8, 2)

    storage = tmp_path / "study.log" if stored else None
    batches = list(zip(X.split(16), LABELS.split(16), strict=True))
    for trials in (2, 3 if stored and sampler == "tpe" else 2):
        found = search.select(
            build, batches[:3], batches[3:], trials=trials, epochs=1, loss_fn=F.cross_entropy,
            sampler=sampler, storage=storage, progress=False,
        )  # fmt: skip
        assert {t.state.name for t in found.study.trials} == {"COMPLETE"}
        assert found.model(X).shape == (64, 2)
    assert all(any(g is c for c in CHOICES[choices]) for g in given)
    if sampler == "grid":
        assert all(any(g is c for g in given) for c in CHOICES[choices])


class Endless(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield from zip(X, LABELS, strict=True)


@pytest.mark.parametrize("of_a_list", [False, True])
def test_streams_without_end_are_read_in_part(of_a_list: bool, tmp_path: Path) -> None:
    memory = search.Memory(tmp_path)
    train = DataLoader(Endless(), 16)
    found = search.select(
        [search.families.MLP] if of_a_list else "auto", train, [(X, LABELS)], trials=1, steps=5,
        memory=memory, progress=False,
    )  # fmt: skip
    assert np.isfinite(found.value)
    assert len(memory.runs()) == 1


def test_a_timeout_is_one_for_the_whole_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law: what is left of it, when trials are run again after a lost connection."""
    now, asked = [1000.0], []
    monkeypatch.setattr(time, "time", lambda: now[0])
    optimize = optuna.Study.optimize

    def slow(study: optuna.Study, *args: Any, timeout: float | None, **options: Any) -> None:
        asked.append(timeout)
        now[0] += 7
        if len(asked) == 1:
            raise OperationalError("", {}, ConnectionError("lost"), connection_invalidated=True)
        optimize(study, *args, timeout=None, **options)

    monkeypatch.setattr(optuna.Study, "optimize", slow)
    batches = list(zip(X.split(16), LABELS.split(16), strict=True))
    search.select(
        search.families.MLP, batches[:3], batches[3:], trials=1, epochs=1, timeout=10,
        storage=f"sqlite:///{tmp_path}/study.db", progress=False,
    )  # fmt: skip
    assert asked == [10, 3]


def test_an_ensemble_of_models_with_masked_classes() -> None:
    """Law: its loss is at most that of the best model; the scores of absent classes are -inf."""

    class Masked(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            absent = torch.tensor([False, False, True, True])
            return self.net(x).masked_fill(absent, -torch.inf)

    batches = list(zip(X.split(16), LABELS.split(16), strict=True))
    found = search.select(
        lambda space: Masked(space.suggest_categorical("width", (4, 8))), batches[:3],
        batches[3:], trials=2, epochs=2, loss_fn=F.cross_entropy, ensemble=2, progress=False,
    )  # fmt: skip
    assert sum(found.members.values()) == pytest.approx(1)
    with torch.no_grad():
        loss = float(F.cross_entropy(found.model(batches[3][0]), batches[3][1]))
    assert loss <= found.value + 1e-6


def test_choices_may_be_an_array() -> None:
    def objective(space: search.Space) -> float:
        return float(space.suggest_categorical("width", np.array([8, 16])))

    found = search.select(objective, trials=2, sampler="grid", progress=False)
    assert found.params == {"width": 8}
