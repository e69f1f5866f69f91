"""Residual networks: convolutional for images, linear layers for tables."""

from __future__ import annotations

from torch import nn

from selftune.search._space import Space
from selftune.search.families._base import AbstractFamily, Closed, dropout
from selftune.search.families._periodic import inputs

LARGE = 16
"""Image size from which the first layer has stride 2, so later layers cost a quarter."""


class ResNet(AbstractFamily):
    """Pre-activation residual blocks; number of blocks and width are searched.

    On tables, so is the embedding of the features (:class:`Periodic`).

    Source: He et al. 2016 (images); Gorishniy et al. 2021 (tables).
    """

    def __call__(self, space: Space) -> nn.Module:
        """A model."""
        if self.shape.kind not in ("images", "table"):
            raise ValueError("resnet takes images or tables, not sequences: use transformer")
        blocks = space.suggest_depth("blocks", 1, 3)
        drop = dropout(space)
        if self.shape.kind == "images":
            return self._images(space, blocks, space.suggest_width("width", (8, 16, 32)), drop)
        return self._table(space, blocks, space.suggest_width("width", (32, 64, 128)), drop)

    def _images(self, space: Space, blocks: int, width: int, drop: nn.Module) -> nn.Module:
        stride = 2 if min(self.shape.inputs[1:]) >= LARGE else 1
        layers: list[nn.Module] = [
            nn.Conv2d(self.shape.inputs[0], width, 3, stride=stride, padding=1)
        ]
        for stage in range(2):
            for _ in range(blocks):
                branch = nn.Sequential(
                    nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                    nn.BatchNorm2d(width), nn.ReLU(), *space.gates(width),
                    nn.Conv2d(width, width, 3, padding=1),
                )  # fmt: skip
                layers.append(space.residual(branch))
            if stage == 0:
                layers.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
                width *= 2
        return Closed(
            self.shape, *layers, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), drop, nn.Linear(width, self.shape.outputs),
        )  # fmt: skip

    def _table(self, space: Space, blocks: int, width: int, drop: nn.Module) -> nn.Module:
        first, size = inputs(space, self.shape)
        layers = [
            space.residual(
                nn.Sequential(
                    nn.BatchNorm1d(width), nn.Linear(width, 2 * width), nn.ReLU(),
                    *space.gates(2 * width), drop, nn.Linear(2 * width, width), drop,
                )
            )
            for _ in range(blocks)
        ]  # fmt: skip
        return Closed(
            self.shape, first, nn.Linear(size, width), *layers,
            nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, self.shape.outputs),
        )  # fmt: skip
