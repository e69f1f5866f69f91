"""Sequences of symbols: sums modulo a prime, and Shakespeare by a plain recurrent network."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.workloads._base import Workload, divided
from benchmarks.workloads.text import characters, pieces_of, shakespeare

PRIME = 31


class Adder(nn.Module):
    """A transformer block on two numbers, averaged over both.

    Args:
        width: Size of an embedding.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.numbers = nn.Embedding(PRIME, width)
        self.places = nn.Parameter(0.1 * torch.randn(2, width))
        self.block = nn.TransformerEncoderLayer(
            width, 4, 128, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, PRIME)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the sum, shape (batch, 31)."""
        return self.head(self.block(self.numbers(x) + self.places).mean(1))


@cache
def modular_addition() -> Workload:
    """Sums modulo 31; three quarters of all pairs to train on, which can be learned by heart.

    Source: Power et al. 2022.
    """
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    return Workload(
        name="modular-addition", make_model=Adder, batch_size=64, steps=1200,
        splits=divided(pairs, pairs.sum(1) % PRIME, (700, 130, 131)),
    )  # fmt: skip


class Elman(nn.Module):
    """One layer of recurrent tanh units without gates between an embedding and a softmax.

    Source: Elman 1990.
    """

    def __init__(self, words: int, size: int = 32, width: int = 96) -> None:
        super().__init__()
        self.words = nn.Embedding(words, size)
        self.recurrent = nn.RNN(size, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, words, time)."""
        return self.head(self.recurrent(self.words(x))[0]).transpose(1, 2)


@cache
def elman() -> Workload:
    """12,000 pieces of 32 characters of Shakespeare."""
    text = characters(shakespeare())
    return Workload(
        name="elman", make_model=lambda: Elman(int(text.max()) + 1), batch_size=32, steps=500,
        splits=pieces_of(text, (12_000, 1500, 3000)),
    )  # fmt: skip
