"""Recurrent networks over words, vectors, image rows, or single numbers."""

from __future__ import annotations

from torch import Tensor, nn

from selftune.search._shape import Shape
from selftune.search._space import Space
from selftune.search.families._base import AbstractFamily, Rows, dropout
from selftune.structure import with_gates

Cell = type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]


class Recurrent(nn.Module):
    """Recurrent layers with a linear head on the last state, or on all states."""

    def __init__(self, shape: Shape, cell: Cell, layers: int, width: int, drop: nn.Module) -> None:
        super().__init__()
        self._shape = shape
        self.rows = Rows(shape, width)
        self.cell = cell(self.rows.size, width, layers, batch_first=True)
        self.drop = drop
        self.head = nn.Linear(width, shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return one output per example, or one per position."""
        seen = self.cell(self.drop(self.rows(x)))[0]
        seen = seen if self._shape.each else seen[:, -1]
        return self._shape.close(self.head(self.drop(seen)))


class AbstractRecurrent(AbstractFamily):
    """Base class of the recurrent families; number of layers and width are searched."""

    cell: Cell

    def __call__(self, space: Space) -> nn.Module:
        """A model."""
        layers = space.suggest_int("layers", 1, 2)
        width = space.suggest_width("width", (32, 64, 128))
        if space.inside and self.cell is nn.RNN:
            raise ValueError("rnn has no gates for structure='inside': use lstm or gru")
        model = Recurrent(self.shape, self.cell, layers, width, dropout(space))
        return with_gates(model) if space.inside else model


class RNN(AbstractRecurrent):
    """Elman network."""

    cell = nn.RNN


class LSTM(AbstractRecurrent):
    """Long short-term memory."""

    cell = nn.LSTM


class GRU(AbstractRecurrent):
    """Gated recurrent units."""

    cell = nn.GRU
