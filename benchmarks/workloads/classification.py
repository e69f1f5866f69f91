"""Classification of clothes: a mixture of experts, a rare class, smoothed labels."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Batch, Workload, divided
from benchmarks.workloads.images import load_fashion_mnist

SHIRT = 6


def _images() -> dict[str, Batch]:
    x, y = load_fashion_mnist()[:2]
    return divided(x.flatten(1), y, (8000, 2000, 4000))


class Experts(nn.Module):
    """Networks of one hidden layer, of which a gate selects and weighs two for each image.

    Args:
        experts: Number of networks.
        width: Units of each hidden layer.

    Source: Shazeer et al. 2017.
    """

    def __init__(self, experts: int = 6, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(784, experts)
        self.first = nn.Parameter(torch.randn(experts, 784, width) / 28)
        self.last = nn.Parameter(torch.randn(experts, width, 10) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 10)."""
        shares = self.gate(x).softmax(1)
        largest, chosen = shares.topk(2, 1)
        largest = largest / largest.sum(1, keepdim=True)
        weights = torch.zeros_like(shares).scatter(1, chosen, largest)
        hidden = torch.relu(torch.einsum("bi,eih->beh", x, self.first))
        outputs = torch.einsum("beh,eho->beo", hidden, self.last)
        return torch.einsum("beo,be->bo", outputs, weights)


@cache
def mixture_of_experts() -> Workload:
    """Six experts, two for each image of Fashion-MNIST."""
    return Workload(
        name="mixture-of-experts", make_model=Experts, splits=_images(), batch_size=64, steps=800
    )


@cache
def rare_class() -> Workload:
    """Shirts, about 1 % of the images, against all other clothes; binary cross-entropy."""
    x, y = load_fashion_mnist()[:2]
    drawn = torch.rand(len(y), generator=torch.Generator().manual_seed(8)) < 0.1
    kept = torch.nonzero((y != SHIRT) | drawn).squeeze(1)[:24_000]
    return Workload(
        name="rare-class", batch_size=64, steps=1000,
        splits=divided(
            x[kept].flatten(1), (y[kept] == SHIRT).float().view(-1, 1), (14_000, 3000, 6000)
        ),
        make_model=lambda: nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 1)),
        criterion=F.binary_cross_entropy_with_logits,
    )  # fmt: skip


def _group_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10)),
    )


@cache
def label_smoothing() -> Workload:
    """A CNN with GroupNorm and dropout on Fashion-MNIST, with labels smoothed by 0.1.

    Source: Szegedy et al. 2016.
    """
    return Workload(
        name="label-smoothing", make_model=_group_norm_cnn, splits=_images(), batch_size=64,
        steps=400, criterion=partial(F.cross_entropy, label_smoothing=0.1),
    )  # fmt: skip
