"""Settings that must be equal for the trials of a study to be comparable."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from selftune.holdout import HoldOut
from selftune.search._shape import size_of
from selftune.search._trial import Trainer


def about(trainer: Trainer) -> dict[str, Any]:
    """What the values of trials depend on, apart from choices, as it is stored with a study."""
    loss = trainer.tuner.get("objective") or trainer.loss_fn
    settings: dict[str, Any] = {
        "direction": "minimize" if trainer.sign > 0 else "maximize",
        "metric": trainer.metric,
        "candidates": sorted(trainer.candidates),
        "length": dict(trainer.length),
        "loss": None if loss is None else name_of(loss),
        "validation": validation(trainer.train, trainer.val, trainer.seed),
    }
    if trainer.structure is not None:
        settings["structure"] = dict(sorted(trainer.structure.items()))
    return settings


def name_of(function: Any) -> str:
    """Name of a function or of a class of callable objects."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def validation(train: Any, val: Any, seed: int) -> list[Any] | None:
    """Number of validation examples or batches, or the split; nothing is read."""
    if isinstance(val, HoldOut):
        return [val.share, seed, count(train)]
    if val is None or isinstance(val, Real):
        return [val, seed, count(train)]
    return [count(val)]


def count(batches: Any) -> int | None:
    """Number of examples of a loader's dataset, or of batches; None if unknown."""
    if isinstance(batches, DataLoader):
        batches = None if isinstance(batches.dataset, IterableDataset) else batches.dataset
    return size_of(batches)
