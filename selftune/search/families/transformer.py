"""Transformers over words, vectors, image rows, or single numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selftune.search._shape import Shape
from selftune.search._space import Space
from selftune.search.families._base import AbstractFamily, Rows, dropout
from selftune.structure import with_gates


class Encoder(nn.Module):
    """Pre-norm encoder with learned positions; outputs are pooled, or one per position."""

    def __init__(self, shape: Shape, layers: int, width: int, heads: int, drop: nn.Module) -> None:
        super().__init__()
        self._shape = shape
        self.rows = Rows(shape, width)
        self.project = nn.Linear(self.rows.size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.rows.length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.drop = drop
        self.head = nn.Linear(width, shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return one output per example, or one per position with a causal mask."""
        rows = self.project(self.rows(x))
        length = rows.shape[1]
        mask = None
        if self._shape.each:
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=rows.device)
        seen = self.layers(self.drop(rows + self.positions[:length]), mask)
        seen = seen if self._shape.each else seen.mean(1)
        return self._shape.close(self.head(self.drop(seen)))


class Transformer(AbstractFamily):
    """Transformer encoder; layers, width, heads and dropout are searched."""

    def __call__(self, space: Space) -> nn.Module:
        """A model."""
        layers = space.suggest_int("layers", 1, 3)
        width = space.suggest_categorical("width", (32, 64, 128))
        heads = space.suggest_width("heads", (2, 4))
        model = Encoder(self.shape, layers, width, heads, dropout(space))
        return with_gates(model) if space.inside else model
