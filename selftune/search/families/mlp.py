"""Multilayer perceptrons."""

from __future__ import annotations

from torch import nn

from selftune.search._space import Space
from selftune.search.families._base import AbstractFamily, Closed, dropout
from selftune.search.families._periodic import inputs


class MLP(AbstractFamily):
    """Linear layers with ReLU and dropout; depth, width and BatchNorm are searched.

    On tables, so is the embedding of the features (:class:`Periodic`).
    """

    def __call__(self, space: Space) -> nn.Module:
        """A model."""
        if self.shape.words is not None:
            raise ValueError("mlp takes numbers, but these inputs are words: use gru or lstm")
        depth = space.suggest_int("depth", 1, 4)
        width = space.suggest_width("width", (32, 64, 128, 256))
        norm = space.suggest_categorical("batch_norm", (False, True))
        drop = dropout(space)
        first, size = inputs(space, self.shape)
        layers = [first]
        for _ in range(depth):
            layers.append(nn.Linear(size, width))
            layers += [nn.BatchNorm1d(width)] if norm else []
            layers += [nn.ReLU(), *space.gates(width), drop]
            size = width
        return Closed(self.shape, *layers, nn.Linear(size, self.shape.outputs))
