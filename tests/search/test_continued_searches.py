"""Second calls with the same storage. Truths: equal arguments, the loss of the returned model."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from selftune import search

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = X.square().sum(1, keepdim=True)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


def build(space: search.Space, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    width = space.suggest_categorical("width", (8, 16))
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 1))


def select(storage: Path, builder: Any = build, **options: Any) -> search.Selection:
    usual: dict[str, Any] = {
        "train": BATCHES[:6], "val": BATCHES[6:], "trials": 1, "steps": 20, "loss_fn": F.mse_loss,
        "progress": False, "tuner": {"compile": False, "probe": False},
    }  # fmt: skip
    return search.select(builder, storage=storage, **{**usual, **options})


def loader(x: Tensor = X, y: Tensor = Y, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), 8, shuffle=True, **options)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "loss": ({}, {"loss_fn": F.l1_loss}, "loss: there mse_loss, here l1_loss"),
    "own loss": ({}, {"loss_fn": nn.HuberLoss()}, "loss: there mse_loss, here HuberLoss"),
    "number of batches": ({}, {"val": BATCHES[7:]}, r"validation: there \[2\], here \[1\]"),
    "loader": ({"val": loader(X[48:], Y[48:])}, {"val": loader(X[40:], Y[40:])}, r"\[16\].*\[24\]"),
    "share": ({"train": loader(), "val": 0.2}, {"train": loader(), "val": 0.3}, "0.2.*0.3"),
    "data of a share": (
        {"train": loader(), "val": 0.2}, {"train": loader(X[1:], Y[1:]), "val": 0.2}, "64.*63"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_search_is_refused(change: str, tmp_path: Path) -> None:
    """Truth: the values of both calls are not of the same function of a model."""
    first, second, different = CHANGES[change]
    select(tmp_path / "j", lambda space: 1.0, **first)
    remedy = r".*pass another study= or storage="
    with pytest.raises(ValueError, match="belongs to another search .*" + different + remedy):
        select(tmp_path / "j", lambda space: 1.0, trials=2, **second)


class Unread(Dataset[Any]):
    """Examples that only a worker of a loader may read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pytest.fail("an example was read")


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        pytest.fail("a stream was read")


class Endless:
    """Batches without a length, begun anew by every pass."""

    def __iter__(self) -> Iterator[Any]:
        pytest.fail("a batch was read")


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "a lambda": lambda: {"loss_fn": lambda o, t: (o - t).abs().mean()},
    "a partial": lambda: {"loss_fn": partial(F.smooth_l1_loss, beta=random.random())},
    "a module": lambda: {"loss_fn": nn.HuberLoss()},
    "a shuffled loader": lambda: {"val": loader()},
    "another batch size": lambda: {"val": DataLoader(Unread(), random.choice((4, 16)))},
    "a stream": lambda: {"val": DataLoader(Streamed(), 8)},
    "batches without a length": lambda: {"val": Endless()},
    "a share": lambda: {"train": loader(), "val": 0.2},
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_search_goes_on(kind: str, tmp_path: Path) -> None:
    """Truth: the same data and loss, made twice; nothing of them is read."""
    for trials in (1, 2):
        found = select(tmp_path / "j", lambda space: 1.0, trials=trials, **SAME[kind]())
        assert len(found.study.trials) == trials


def test_a_value_is_that_of_the_model_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The builder has changed. Truth: the mean over the validation batches, of equal sizes."""
    first = select(tmp_path / "j")
    for path in (tmp_path / "j.runs" / "weights").iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING, "selftune"):
        other = select(tmp_path / "j", partial(build, activation=nn.Tanh))
    assert other.model is not None
    with torch.no_grad():
        values = [float(F.mse_loss(other.model(x), y)) for x, y in BATCHES[6:]]
    assert other.value == pytest.approx(sum(values) / 2, rel=1e-5)
    assert other.value != pytest.approx(first.value, rel=0.01)
    assert f"{other.value:.6g}, and was {first.value:.6g}" in caplog.text
