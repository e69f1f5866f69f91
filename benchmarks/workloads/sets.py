"""Sets: clothes as point clouds without an order; pooling by attention."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.workloads._base import Batch, Workload
from benchmarks.workloads.images import load_fashion_mnist

POINTS = 48


def _clouds(images: Tensor, seed: int) -> Tensor:
    """Pixels drawn in proportion to their brightness, as coordinates in [−1, 1] with noise.

    Args:
        images: Standardised, shape (n, 1, 28, 28).
        seed: Of the points.

    Returns:
        Shape (n, 48, 2).
    """
    generator = torch.Generator().manual_seed(seed)
    weights = (images.flatten(1) * 0.353 + 0.286).clamp_min(1e-6)
    pixels = torch.multinomial(weights, POINTS, replacement=True, generator=generator)
    points = torch.stack([pixels // 28, pixels % 28], -1).float()
    return (points + torch.rand(points.shape, generator=generator)) / 14 - 1


class AttentionPooling(nn.Module):
    """Four learned queries that attend to the points of a set, each embedded by itself.

    Source: Zaheer et al. 2017 (deep sets); Lee et al. 2019 (pooling by attention).
    """

    def __init__(self, width: int = 64, queries: int = 4) -> None:
        super().__init__()
        self.points = nn.Sequential(
            *(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
            nn.Linear(width, width),
        )
        self.queries = nn.Parameter(0.1 * torch.randn(queries, width))
        self.scale = width**-0.5
        self.head = nn.Sequential(
            nn.Linear(queries * width, width), nn.GELU(), nn.Linear(width, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 10)."""
        points = self.points(x)  # shape (batch, points, width)
        shares = (self.scale * points @ self.queries.T).softmax(1)  # (batch, points, queries)
        return self.head((shares.transpose(1, 2) @ points).flatten(1))


@cache
def point_sets() -> Workload:
    """8,000 sets of 48 points; a network of 26,000 parameters that pools by attention."""
    x, y, test_x, test_y = load_fashion_mnist()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))[:10_000]
    x, y = x[order], y[order]
    splits: dict[str, Batch] = {
        "train": (_clouds(x[:8000], 1), y[:8000]),
        "val": (_clouds(x[8000:], 2), y[8000:]),
        "test": (_clouds(test_x[:4000], 3), test_y[:4000]),
    }
    return Workload(
        name="point-sets", make_model=AttentionPooling, splits=splits, batch_size=64, steps=800
    )
