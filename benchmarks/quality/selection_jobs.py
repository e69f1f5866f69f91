"""The data sets of the model selections, and how a selected model is judged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from benchmarks.workloads import digits, fashion
from selftune import search

Split = tuple[Tensor, Tensor]
CLASSES = ("digits", "fashion", "breast_cancer")
TABLES = ("energy", "concrete", "yacht", "power", "wine_red", "breast_cancer")


@dataclass(frozen=True)
class Job:
    """A data set in three parts, how long a trial is, and how long a search."""

    splits: dict[str, Split]
    batch: int
    steps: int
    seconds: float

    def batches(self, split: str, seed: int | None = None) -> list[Split]:
        """The batches of a split, shuffled anew with a seed."""
        x, y = self.splits[split]
        if seed is not None:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            x, y = x[order], y[order]
        whole = len(x) - len(x) % self.batch if split == "train" else len(x)
        return list(zip(x[:whole].split(self.batch), y[:whole].split(self.batch), strict=True))


class Shuffled:
    """Training batches in another order at each pass."""

    def __init__(self, job: Job, seed: int, split: str = "train") -> None:
        self.job, self.seed, self.split = job, seed, split

    def __len__(self) -> int:
        return len(self.job.batches(self.split))

    def __iter__(self) -> Any:
        self.seed += 1000
        return iter(self.job.batches(self.split, self.seed))


@cache
def job(name: str) -> Job:
    """The job of a name."""
    if name in CLASSES[:2]:
        work = {"digits": digits, "fashion": fashion}[name]()
        splits = {k: (x, y) for k, (x, y) in work.splits.items()}
        return Job(splits, 64, *{"digits": (2000, 60.0), "fashion": (625, 150.0)}[name])
    return Job(uci(name), 32, 2000, 60.0)


@cache
def uci(name: str) -> dict[str, Split]:
    """A UCI set, standardised by its training part: 64 % to train, 16 % to validate, the rest."""
    if name in CLASSES:
        x, y = map(torch.from_numpy, load_breast_cancer(return_X_y=True))
        x = x.float()
    else:
        with np.load(Path(os.environ["SELFTUNE_DATA"]) / "uci" / f"{name}.npz") as data:
            x, y = (torch.tensor(data[k], dtype=torch.float32) for k in ("x", "y"))
        y = y.reshape(len(y), -1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = [int(0.64 * len(x)), int(0.8 * len(x))]
    parts = torch.tensor_split(order, cut)
    train = parts[0]
    x = (x - x[train].mean(0)) / x[train].std(0).clamp_min(1e-6)
    if y.is_floating_point():
        y = (y - y[train].mean(0)) / y[train].std(0)
    return {k: (x[p], y[p]) for k, p in zip(("train", "val", "test"), parts, strict=True)}


def judged(model: nn.Module, split: Split, classes: bool) -> float:
    """Accuracy in percent, or the root of the mean square error."""
    model.eval()
    with torch.no_grad():
        output = torch.cat([model(x) for x in split[0].split(1000)])
    if classes:
        return 100 * float(search.accuracy(output, split[1]))
    return float((output - split[1]).square().mean().sqrt())
