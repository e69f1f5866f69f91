"""Synthetic data: factors of a matrix, a network as teacher, sums in sequences."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided

USERS, ITEMS = 600, 400


class Factors(nn.Module):
    """Ratings as inner products of embeddings, plus biases.

    Args:
        rank: Size of an embedding.
    """

    def __init__(self, rank: int = 16) -> None:
        super().__init__()
        self.rank = rank
        self.users, self.items = nn.Embedding(USERS, rank), nn.Embedding(ITEMS, rank)
        self.user_bias, self.item_bias = nn.Embedding(USERS, 1), nn.Embedding(ITEMS, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Ratings, shape (batch, 1), of users and items."""
        user, item = pairs.unbind(1)
        product = (self.users(user) * self.items(item)).sum(1, keepdim=True) / self.rank**0.5
        return product + self.user_bias(user) + self.item_bias(item)


@cache
def factors() -> Workload:
    """50,000 noisy entries of a matrix of rank 5; mean square error, of which 0.25 is noise."""
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(USERS, 5, generator=generator)
    right = torch.randn(ITEMS, 5, generator=generator)
    user = torch.randint(USERS, (50_000,), generator=generator)
    item = torch.randint(ITEMS, (50_000,), generator=generator)
    noise = 0.5 * torch.randn(50_000, generator=generator)
    y = ((left[user] * right[item]).sum(1) / 5**0.5 + noise).view(-1, 1)
    return Workload(
        name="factors", make_model=Factors, batch_size=256, steps=1500, criterion=F.mse_loss,
        splits=divided(torch.stack([user, item], 1), y, (40_000, 4000, 6000)),
    )  # fmt: skip


@cache
def teacher() -> Workload:
    """Outputs of a random network of 32 units, with noise; mean square error, of which 0.01."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8000, 64, generator=generator)
    first = torch.randn(64, 32, generator=generator) / 8
    last = torch.randn(32, 1, generator=generator) / 32**0.5
    y = 2 * torch.relu(x @ first) @ last + 0.1 * torch.randn(8000, 1, generator=generator)
    return Workload(
        name="teacher", batch_size=64, steps=1500, criterion=F.mse_loss,
        splits=divided(x, y, (4000, 1000, 3000)),
        make_model=lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1)),
    )  # fmt: skip


class Adder(nn.Module):
    """An LSTM that reads pairs of a number and a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(2, 48, batch_first=True), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, shape (batch, 1)."""
        return self.last(self.lstm(x)[0][:, -1])


@cache
def adding() -> Workload:
    """The sum of the two marked ones of 30 numbers; mean square error.

    Source: Hochreiter & Schmidhuber 1997.
    """
    generator, count, length = torch.Generator().manual_seed(9), 12_000, 30
    numbers = torch.rand(count, length, generator=generator)
    marks = torch.zeros(count, length)
    for low, high in ((0, length // 2), (length // 2, length)):
        place = torch.randint(low, high, (count,), generator=generator)
        marks[torch.arange(count), place] = 1
    y = (numbers * marks).sum(1, keepdim=True)
    return Workload(
        name="adding", make_model=Adder, batch_size=64, steps=1200, criterion=F.mse_loss,
        splits=divided(torch.stack([numbers, marks], 2), y, (9000, 1000, 2000)),
    )  # fmt: skip
