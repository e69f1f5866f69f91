"""Second calls with the same storage. Truths: equal arguments, the loss of the returned model."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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


def far(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: scale * (output - target).abs().max()


def other_far(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "loss": ({}, {"loss_fn": F.l1_loss}, "loss: there <function mse_loss>, here <function l1_loss"),
    "own loss": ({}, {"loss_fn": lambda o, t: F.mse_loss(o, t)}, "loss: .*here <function <lambda>"),
    "partial": (
        {"loss_fn": partial(F.smooth_l1_loss, beta=1.0)},
        {"loss_fn": partial(F.smooth_l1_loss, beta=2.0)}, "loss: .*beta=1.0.*beta=2.0",
    ),
    "metric": (
        {"metric": "far", "tuner": {"metrics": {"far": far(1.0)}}},
        {"metric": "far", "tuner": {"metrics": {"far": other_far}}}, "metric: .*other_far",
    ),
    "batches": ({}, {"val": [(x, y + 100) for x, y in BATCHES[6:]]}, "data: "),
    "number of batches": ({}, {"val": BATCHES[7:]}, "data: .*'length': 2.*'length': 1"),
    "loader": ({"val": loader(X[48:], Y[48:])}, {"val": loader(X[40:], Y[40:])}, "data: "),
    "targets": ({"val": loader(X[:9], Y[:9])}, {"val": loader(X[:9], -Y[:9])}, "data: "),
    "share": (
        {"train": loader(), "val": 0.2}, {"train": loader(), "val": 0.3}, "data: .*'0.2'.*'0.3'"
    ),
    "data of a share": (
        {"train": loader(), "val": 0.2}, {"train": loader(X[1:], Y[1:]), "val": 0.2}, "data: "
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


class Varied(Dataset[Any]):
    """Examples with random transforms, by one of the global generators or one of its own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + self.draw(), Y[index]


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((X[i], Y[i]) for i in np.random.default_rng().permutation(64))


class Batches:
    """Batches in a random order."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        return iter(random.sample(BATCHES, 8))


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "a lambda": lambda: {"loss_fn": far(1.0)},
    "a module": lambda: {"loss_fn": nn.HuberLoss()},
    "a shuffled loader": lambda: {"val": loader()},
    "another batch size": lambda: {"val": DataLoader(TensorDataset(X, Y), random.choice((4, 16)))},
    "transforms of torch": lambda: {"val": DataLoader(Varied(lambda: float(torch.rand(()))), 8)},
    "transforms of Python": lambda: {"val": DataLoader(Varied(random.random), 8)},
    "transforms of numpy": lambda: {"val": DataLoader(Varied(np.random.random), 8)},
    "others": lambda: {"val": DataLoader(Varied(np.random.default_rng().random), 8)},
    "rounding": lambda: {"val": [(x * (1 + 1e-7 * random.random()), y) for x, y in BATCHES]},
    "a stream": lambda: {"val": DataLoader(Streamed(), 8)},
    "an iterable": lambda: {"val": Batches()},
    "a share": lambda: {"train": loader(), "val": 0.2},
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_search_goes_on(kind: str, tmp_path: Path) -> None:
    """Truth: the same data and loss, made twice; global generators are where they were."""
    for trials in (1, 2):
        options = SAME[kind]()
        before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
        found = select(tmp_path / "j", lambda space: 1.0, trials=trials, **options)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index] # noqa: NPY002
        assert len(found.study.trials) == trials


def test_an_iterator_is_not_read_to_compare_data(tmp_path: Path) -> None:
    val = iter(BATCHES)
    select(tmp_path / "j", lambda space: 1.0, val=val)
    assert next(val) is BATCHES[0]


@pytest.mark.parametrize("weights", ["stored", "lost"])
@pytest.mark.parametrize("metric", ["loss", "far"])
def test_a_value_is_that_of_the_returned_model(
    metric: str, weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truth: its mean over the validation batches, which have equal sizes."""
    measure = {"loss": F.mse_loss, "far": other_far}
    options: dict[str, Any] = {
        "metric": metric, "tuner": {"compile": False, "metrics": {"far": other_far}},
    }  # fmt: skip
    first = select(tmp_path / "j", **options)
    again = select(tmp_path / "j", **options)
    assert again.value == first.value
    if weights == "lost":
        for path in (tmp_path / "j.runs" / "weights").iterdir():
            path.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "selftune"):
        other = select(tmp_path / "j", partial(build, activation=nn.Tanh), **options)
    assert other.model is not None
    with torch.no_grad():
        values = [float(measure[metric](other.model(x), y)) for x, y in BATCHES[6:]]
    assert other.value == pytest.approx(sum(values) / 2, rel=1e-5)
    assert other.value != pytest.approx(first.value, rel=0.01)
    assert f"{other.value:.6g}" in caplog.text
    assert f"{first.value:.6g}" in caplog.text
