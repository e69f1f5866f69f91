"""UCI regression on the first of the published splits."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, folder

SETS = ("energy", "concrete", "yacht", "power", "wine_red")


@cache
def uci(name: str, split: int = 0) -> Workload:
    """A UCI set: a fifth of the published training part validates; all standardised by the rest."""
    with np.load(folder() / "uci" / f"{name}.npz", allow_pickle=False) as file:
        x, y = (torch.tensor(file[k], dtype=torch.float32) for k in ("x", "y"))
        tested = torch.tensor(file["test_mask"][split])
    rest = torch.nonzero(~tested).squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))]
    held = len(rest) // 5
    parts = {"train": rest[held:], "val": rest[:held], "test": torch.nonzero(tested).squeeze(1)}
    y = y.view(-1, 1)
    own = parts["train"]
    x, y = ((t - t[own].mean(0)) / t[own].std(0).clamp_min(1e-6) for t in (x, y))
    return Workload(
        name=name, criterion=F.mse_loss, batch_size=32, steps=1500,
        make_model=partial(_mlp, x.shape[1]), splits={k: (x[p], y[p]) for k, p in parts.items()},
    )  # fmt: skip


def _mlp(features: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    )
