"""Multilayer perceptrons."""

from __future__ import annotations

import math

from torch import nn

from selftune.search._space import Space
from selftune.search.families._base import AbstractFamily, Closed, dropout


class MLP(AbstractFamily):
    """Linear layers with ReLU and dropout; depth, width and BatchNorm are searched."""

    def __call__(self, space: Space) -> nn.Module:
        """A model."""
        if self.shape.words is not None:
            raise ValueError("mlp takes numbers, but these inputs are words: use gru or lstm")
        depth = space.suggest_int("depth", 1, 4)
        width = space.suggest_width("width", (32, 64, 128, 256))
        norm = space.suggest_categorical("batch_norm", (False, True))
        drop = dropout(space)
        layers: list[nn.Module] = [nn.Flatten()]
        size = math.prod(self.shape.inputs)
        for _ in range(depth):
            layers.append(nn.Linear(size, width))
            layers += [nn.BatchNorm1d(width)] if norm else []
            layers += [nn.ReLU(), *space.gates(width), drop]
            size = width
        return Closed(self.shape, *layers, nn.Linear(size, self.shape.outputs))
