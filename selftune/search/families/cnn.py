"""Plain convolutional networks."""

from __future__ import annotations

from torch import nn

from selftune.search._space import Space
from selftune.search.families._base import AbstractFamily, Closed, dropout


class CNN(AbstractFamily):
    """Convolution, BatchNorm, ReLU and pooling; depth, width and head size are searched."""

    def __call__(self, space: Space) -> nn.Module:
        """A model."""
        if self.shape.kind != "images":
            raise ValueError(
                f"cnn takes images (channels, height, width), not {self.shape.inputs}: use mlp"
            )
        channels, *size = self.shape.inputs
        depth = space.suggest_int("depth", 1, 3)
        width = space.suggest_width("width", (8, 16, 32))
        head = space.suggest_width("head", (32, 64, 128))
        drop = dropout(space)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += space.gates(width)
            if min(size) > 1:
                layers.append(nn.MaxPool2d(2))
                size = [s // 2 for s in size]
            channels, width = width, 2 * width
        flat = channels * size[0] * size[1]
        return Closed(
            self.shape, *layers, nn.Flatten(), drop,
            nn.Linear(flat, head), nn.ReLU(), *space.gates(head), drop,
            nn.Linear(head, self.shape.outputs),
        )  # fmt: skip
