"""Densities: a normalizing flow on two moons, and the noise predictor of a diffusion model."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided
from benchmarks.workloads.images import as_pixels, load_fashion_mnist

PIXELS = 196
SHIFT = 1.0
"""Added to the flow's loss, which could be negative, so that ratios of losses have a meaning."""


class Flow(nn.Module):
    """Affine couplings, which scale and shift one coordinate by functions of the other.

    Args:
        depth: Number of couplings.
        width: Units of each coupling's hidden layer.

    Source: Dinh et al. 2017.
    """

    def __init__(self, depth: int = 6, width: int = 48) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 2)) for _ in range(depth)
        )

    def forward(self, points: Tensor) -> Tensor:
        """Negative log-densities, shape (batch, 1), of points in the plane."""
        kept, changed = points.chunk(2, 1)
        volume = torch.zeros_like(kept)
        for coupling in self.couplings:
            scale, shift = coupling(kept).chunk(2, 1)
            scale = 2 * torch.tanh(scale)
            kept, changed = changed * scale.exp() + shift, kept
            volume = volume + scale
        return 0.5 * (kept**2 + changed**2) - volume + math.log(2 * math.pi)


def mean_surprise(outputs: Tensor, _: Tensor) -> Tensor:
    """The mean negative log-likelihood, plus a shift."""
    return outputs.mean() + SHIFT


@cache
def flow() -> Workload:
    """The density of two noisy half circles."""
    generator, count = torch.Generator().manual_seed(5), 10_000
    angle = math.pi * torch.rand(count, 1, generator=generator)
    lower = (torch.rand(count, 1, generator=generator) > 0.5).float()
    sign = 1 - 2 * lower
    moons = torch.cat([sign * torch.cos(angle) + lower, sign * torch.sin(angle) + 0.5 * lower], 1)
    points = moons + 0.07 * torch.randn(count, 2, generator=generator)
    points = (points - points.mean(0)) / points.std(0)
    return Workload(
        name="flow", make_model=Flow, batch_size=128, steps=1000, criterion=mean_surprise,
        splits=divided(points, points[:, :1], (6000, 1500, 2500)),
    )  # fmt: skip


class NoisePredictor(nn.Module):
    """The noise in an image, from the noisy image and sines and cosines of the time.

    Args:
        width: Units of the hidden layers.
        frequencies: Number of frequencies of the time.

    Source: Ho et al. 2020.
    """

    def __init__(self, width: int = 256, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 4, frequencies)))
        self.layers = nn.Sequential(
            *(nn.Linear(PIXELS + 2 * frequencies, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, PIXELS)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, 196), of noisy images with the time in the last column."""
        phase = x[:, PIXELS:] * self.frequencies
        return self.layers(torch.cat([x[:, :PIXELS], phase.sin(), phase.cos()], 1))


@cache
def diffusion() -> Workload:
    """The noise in images of 14 × 14 pixels at random times; mean square error."""
    clothes = as_pixels(load_fashion_mnist()[0][:20_000])
    image = 2 * F.avg_pool2d(clothes, 2).flatten(1) - 1
    generator = torch.Generator().manual_seed(6)
    time = torch.rand(len(image), 1, generator=generator)
    noise = torch.randn(image.shape, generator=generator)
    angle = 0.5 * math.pi * time
    noisy = torch.cos(angle) * image + torch.sin(angle) * noise
    return Workload(
        name="diffusion", make_model=NoisePredictor, batch_size=128, steps=800,
        splits=divided(torch.cat([noisy, time], 1), noise, (14_000, 2000, 4000)),
        criterion=F.mse_loss,
    )  # fmt: skip
