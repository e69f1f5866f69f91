"""The nets that steps are timed on, each with batches to train it on, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import small_cnn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Net:
    """A model with its loss and a handful of batches.

    Attributes:
        make: Builds the model.
        loss: Of outputs and targets.
        batches: Training batches; the last of them are used for validation.
        block: Steps that are timed together.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[Batch]
    block: int


def mlp(width: int, hidden: int) -> nn.Module:
    """Two hidden layers, ten classes."""
    return nn.Sequential(
        *(nn.Linear(width, hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)),
    )


class CharTransformer(nn.Module):
    """A causal transformer over characters.

    Args:
        vocabulary: Number of characters.
        width: Size of the residual stream.
        layers: Number of blocks.
        heads: Number of attention heads.
        context: Longest sequence.
    """

    def __init__(
        self, vocabulary: int = 65, width: int = 128, layers: int = 4, heads: int = 4,
        context: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next character, shape (batch, context, vocabulary)."""
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        parts = self.qkv(self.norms[0](h)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return h + self.narrow(F.gelu(self.wide(self.norms[1](h))))


def char_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the next character."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _images(count: int, *shape: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    return [(draw(), torch.randint(10, shape[:1], generator=generator)) for _ in range(count)]


def _texts(count: int, batch: int, context: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, context)
    return [
        tuple(torch.randint(65, shape, generator=generator) for _ in range(2)) for _ in range(count)
    ]


NETS: dict[str, Callable[[], Net]] = {
    "MLP 64-128-128-10, batch 64": lambda: Net(
        make=lambda: mlp(64, 128), loss=F.cross_entropy, batches=_images(10, 64, 64), block=200
    ),
    "MLP 784-256-256-10, batch 128": lambda: Net(
        make=lambda: mlp(784, 256), loss=F.cross_entropy, batches=_images(10, 128, 784), block=50
    ),
    "CNN + BatchNorm, batch 64, 28×28": lambda: Net(
        make=small_cnn, loss=F.cross_entropy, batches=_images(10, 64, 1, 28, 28), block=20
    ),
    "char transformer 4 × 128, context 128, batch 16": lambda: Net(
        make=CharTransformer, loss=char_loss, batches=_texts(10, 16, 128), block=10
    ),
}
