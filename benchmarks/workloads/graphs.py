"""Graphs: digits as nodes beside their nearest neighbours; two rounds of messages."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload

NEIGHBOURS = 8


class GraphNet(nn.Module):
    """Two layers h' = ReLU(W h + V mean of h over the neighbours), then a linear one.

    A pass computes all nodes and returns the requested ones.

    Args:
        features: Of all nodes, shape (nodes, features).
        neighbours: Their indices, shape (nodes, neighbours).
        width: Units of each layer.

    Source: Hamilton, Ying & Leskovec 2017 (GraphSAGE).
    """

    def __init__(self, features: Tensor, neighbours: Tensor, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("neighbours", neighbours)
        sizes = [features.shape[1], width, width]
        pairs = list(pairwise(sizes))
        self.own = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.others = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.head = nn.Linear(width, 10)

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits of nodes, shape (batch, 10)."""
        h = self.features
        for own, others in zip(self.own, self.others, strict=True):
            # V before the mean: the mean is linear, and h' is narrower than h.
            h = F.relu(own(h) + others(h)[self.neighbours].mean(1))
        return self.head(h[nodes])


@cache
def digit_graph() -> Workload:
    """1,797 nodes: 300 to train on, 500 to validate, 997 to test; neighbours of noisy images.

    Features are 16 noisy numbers an image, so that the neighbours are needed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    targets = torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(5)
    noisy = images.flatten(1) + 0.3 * torch.randn(len(images), 64, generator=generator)
    distances = torch.cdist(noisy, noisy)
    distances.fill_diagonal_(torch.inf)
    neighbours = distances.topk(NEIGHBOURS, largest=False).indices
    coarse = F.avg_pool2d(images.unsqueeze(1), 2).flatten(1)
    coarse = coarse + 0.1 * torch.randn(coarse.shape, generator=generator)
    coarse = (coarse - coarse.mean(0)) / coarse.std(0)
    order = torch.randperm(len(images), generator=generator)
    parts = dict(zip(("train", "val", "test"), order.split((300, 500, 997)), strict=True))
    return Workload(
        name="digit-graph", make_model=partial(GraphNet, coarse, neighbours), batch_size=32,
        steps=800, splits={k: (p, targets[p]) for k, p in parts.items()},
    )  # fmt: skip
