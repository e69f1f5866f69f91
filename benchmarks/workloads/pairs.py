"""Pairs: handwritten characters of equal or different classes; a siamese network."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Batch, Workload, folder

MARGIN = 1.0


def contrastive(distances: Tensor, same: Tensor) -> Tensor:
    """The mean of d² over equal pairs and of max(0, 1 − d)² over the others.

    Args:
        distances: d, shape (batch,).
        same: 1 for pairs of one kind, else 0.

    Source: Hadsell, Chopra & LeCun 2006.
    """
    apart = F.relu(MARGIN - distances)
    return (same * distances**2 + (1 - same) * apart**2).mean()


class Siamese(nn.Module):
    """The distance between the embeddings of two images; 26,000 parameters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            *(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * width, 24)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Distances, shape (batch,), of pairs of images, shape (batch, 2, 28, 28)."""
        a, b = self.embed(x.flatten(0, 1).unsqueeze(1)).unflatten(0, (-1, 2)).unbind(1)
        # Inside the root: at 0 a norm has no derivative.
        return ((a - b).square().sum(1) + 1e-6).sqrt()


def _drawn(images: Tensor, labels: Tensor, kinds: Tensor, count: int, seed: int) -> Batch:
    """Pairs of the given kinds, half of them equal; each kind has 20 images."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.nonzero(labels == kind).squeeze(1) for kind in kinds])
    first = torch.randint(len(kinds), (count,), generator=generator)
    shift = torch.randint(1, len(kinds), (count,), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5
    second = torch.where(same, first, (first + shift) % len(kinds))
    columns = torch.randint(20, (2, count), generator=generator)
    # An image is no pair with itself.
    columns[1] = torch.where(same & (columns[0] == columns[1]), columns[1] + 1, columns[1]) % 20
    chosen = torch.stack([order[first, columns[0]], order[second, columns[1]]], 1)
    return images[chosen], same.float()


@cache
def siamese() -> Workload:
    """6,000 pairs of 90 kinds of characters; validated and tested on 20 and 26 other kinds."""
    with np.load(folder() / "omniglot_small.npz", allow_pickle=False) as file:
        images, labels = torch.tensor(file["x"]).float() / 255, torch.tensor(file["y"])
    kinds = torch.randperm(136, generator=torch.Generator().manual_seed(0)).split((90, 20, 26))
    counts = zip(("train", "val", "test"), kinds, (6000, 1500, 3000), (1, 2, 3), strict=True)
    return Workload(
        name="siamese", criterion=contrastive, make_model=Siamese, batch_size=64, steps=500,
        splits={n: _drawn(images, labels, k, count, seed) for n, k, count, seed in counts},
    )  # fmt: skip
