"""Settings that must be equal for the trials of a study to be comparable."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from selftune._identity import describe
from selftune._modes import random_states, restore_random_states
from selftune.holdout import HoldOut
from selftune.search._trial import Trainer

READS = 4
"""Number of times an example is read; it has a checksum if all are equal."""


def about(trainer: Trainer) -> dict[str, Any]:
    """What the values of trials depend on, apart from choices, as it is stored with a study.

    Args:
        trainer: Runs the trials.
    """
    measure, metrics = trainer.metric, trainer.tuner.get("metrics") or {}
    if measure in metrics:
        measure = f"{measure}, {describe(metrics[measure])}"
    loss = trainer.tuner.get("objective") or trainer.loss_fn
    settings: dict[str, Any] = {
        "direction": "minimize" if trainer.sign > 0 else "maximize",
        "metric": measure,
        "candidates": sorted(trainer.candidates),
        "length": dict(trainer.length),
        "loss": None if loss is None else describe(loss),
        "data": data_of(trainer.train, trainer.val, trainer.seed),
    }
    if trainer.structure is not None:
        settings["structure"] = dict(sorted(trainer.structure.items()))
    return settings


def data_of(train: Any, val: Any, seed: int) -> dict[str, Any] | None:
    """What is known of the validation data without reading batches; None if nothing is.

    Batches in a list are in order, and so are the examples of a dataset, whatever the order of its
    loader. Other iterables may be streams, or in random order.

    Args:
        train: Training batches.
        val: Validation batches, or the share of the training data.
        seed: Seed of the split.
    """
    if val is None or isinstance(val, (int, float, HoldOut)):
        parts = None if train is None else data_of(None, train, seed)
        return None if parts is None else {"share": describe(val), "seed": seed, **parts}
    items = val
    if isinstance(val, DataLoader):
        known = type(val.sampler) in (RandomSampler, SequentialSampler)
        usual = val.batch_sampler is None or type(val.batch_sampler) is BatchSampler
        items = val.dataset if known and usual else None
    elif not isinstance(val, (list, tuple)):
        items = None
    if not isinstance(items, Sized) or not len(items):
        return None
    return {"length": len(items), "checksum": checksum_of_first(items)}


def checksum_of_first(items: Any) -> int | None:
    """A checksum of the first item; None if it varies for the same state of random generators.

    Transforms with a generator of their own may change it.
    """
    now = random_states()
    found = set()
    try:
        for _ in range(READS):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002 - users' data sets use it
            found.add(checksum(items[0]))
    finally:
        restore_random_states(now)
    return found.pop() if len(found) == 1 else None


def checksum(item: Any) -> int:
    """A checksum of an example or a batch, the same on machines that round differently."""
    return zlib.crc32(" ".join(map(summary, tree_leaves(item))).encode())


def summary(value: Any) -> str:
    """Shape of numbers, with a few digits of their norm and mean; the type of anything else."""
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        array = np.asarray(value)
        value = torch.from_numpy(array.astype(np.float64)) if array.dtype.kind in "biuf" else value
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_complex():
        return type(value).__name__
    numbers = value.detach().cpu().double()
    norm = float(numbers.square().mean().sqrt())
    mean = round(float(numbers.mean()) / (norm or 1.0), 3) + 0.0  # −0.0 is 0.0
    return f"{tuple(value.shape)} {norm:.3g} {mean}"
