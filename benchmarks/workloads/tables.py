"""Tables: UCI regression on the first of the published splits; prices of 53,940 diamonds."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
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


class TableNet(nn.Module):
    """Embeddings of categorical columns, joined with numbers, and an MLP.

    Args:
        numbers: How many columns of numbers the input begins with.
        levels: How many levels each of the categorical columns behind them has.
        width: Units of each of three hidden layers.
    """

    def __init__(self, numbers: int, levels: tuple[int, ...], width: int = 128) -> None:
        super().__init__()
        self.numbers = numbers
        self.tables = nn.ModuleList(nn.Embedding(count, 4) for count in levels)
        self.layers = nn.Sequential(
            *(nn.Linear(numbers + 4 * len(levels), width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Predictions, shape (batch, 1)."""
        codes = x[:, self.numbers :].long()
        rows = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        return self.layers(torch.cat([x[:, : self.numbers], *rows], 1))


@cache
def diamonds() -> Workload:
    """Logarithms of 53,940 prices from six numbers and three categories; mean square error."""
    with np.load(folder() / "diamonds.npz", allow_pickle=False) as file:
        x, codes, price = (torch.tensor(file[k]) for k in ("numeric", "categorical", "price"))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split((40_000, 5000, 8940)), strict=True))
    y = price.log().view(-1, 1)
    own = parts["train"]
    x, y = ((t - t[own].mean(0)) / t[own].std(0) for t in (x, y))
    levels = tuple(int(n) + 1 for n in codes.amax(0))
    x = torch.cat([x, codes.float()], 1)
    return Workload(
        name="diamonds", criterion=F.mse_loss, batch_size=256, steps=2000,
        make_model=partial(TableNet, 6, levels), splits={k: (x[p], y[p]) for k, p in parts.items()},
    )  # fmt: skip
