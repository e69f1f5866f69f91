"""Adaptation: a transformer pretrained on Shakespeare, adapted to Python by low-rank updates."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload
from benchmarks.workloads.programs import sources
from benchmarks.workloads.text import PRINTABLE, pieces_of, printable, shakespeare

TIME = 32
RANK = 4


class Adapted(nn.Module):
    """A frozen linear layer with a trained update of low rank: W x + b + B A x.

    Args:
        layer: The layer; its parameters are frozen.
        rank: Rows of A, columns of B; B starts at 0.

    Source: Hu et al. 2022 (LoRA).
    """

    def __init__(self, layer: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Activations, as of the layer."""
        return self.layer(x) + self.up(self.down(x))


class Block(nn.Module):
    """Causal attention and a feed-forward layer, norms first, of linear layers with names."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream, shape (batch, time, width)."""
        y = self.norms[0](x)
        parts = (layer(y) for layer in (self.query, self.key, self.value))
        parts = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in parts)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Characters(nn.Module):
    """A transformer of two blocks on characters of printable ASCII."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(PRINTABLE, width), nn.Embedding(TIME, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, PRINTABLE)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, characters, time)."""
        stream = self.blocks(self.characters(x) + self.positions.weight)
        return self.head(self.norm(stream)).transpose(1, 2)


@cache
def pretrained(steps: int = 200) -> Characters:
    """The transformer after some steps of torch's AdamW on Shakespeare, always the same ones.

    Global random numbers are left as they were.
    """
    x, y = pieces_of(printable(shakespeare()), (8000, 1, 1))["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Characters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def with_adapters() -> nn.Module:
    """A copy of the pretrained transformer, with adapters on query, value and feed-forward."""
    model = copy.deepcopy(pretrained())
    for block in model.blocks:
        for name in ("query", "value", "up", "down"):
            setattr(block, name, Adapted(getattr(block, name)))
    return model


@cache
def low_rank() -> Workload:
    """2,000 pieces of 32 characters of Python; 5,120 of 86,753 parameters are trained."""
    codes = printable(sources(680_000))
    return Workload(
        name="low-rank", make_model=with_adapters, splits=pieces_of(codes, (2000, 800, 3000)),
        batch_size=32, steps=500,
    )  # fmt: skip
