"""Colour photographs: the two that come with scikit-learn, denoised and fitted by a sine network.

Blocks of 32 × 32 pixels are split at random, so that no pixel is in two of the parts.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Batch, Workload

SIZE = 32
NOISE = 0.15


@cache
def photographs() -> Tensor:
    """The two photographs in [0, 1], shape (2, 3, 427, 640)."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    return images.permute(0, 3, 1, 2).float() / 255


@cache
def blocks() -> Tensor:
    """The 520 disjoint blocks of both photographs, shuffled, shape (520, 3, 32, 32)."""
    found = photographs().unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)
    found = found.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIZE, SIZE)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def crops(found: Tensor, count: int, size: int, seed: int) -> Tensor:
    """Random windows of blocks, some mirrored, shape (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(found), (count,), generator=generator)
    corners = torch.randint(found.shape[-1] - size + 1, (count, 2), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    windows = found.unfold(2, size, 1).unfold(3, size, 1)  # a view
    cut = windows[which, :, corners[:, 0], corners[:, 1]]
    return torch.where(mirrored.view(-1, 1, 1, 1), cut.flip(-1), cut)


def convolutions(inputs: int, outputs: int) -> nn.Module:
    """Two 3 × 3 convolutions, each followed by ReLU."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()),
    )


class UNet(nn.Module):
    """A U-Net of three resolutions, which predicts the noise; 27,600 parameters.

    Source: Ronneberger, Fischer & Brox 2015.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = convolutions(3, width)
        self.second = convolutions(width, 2 * width)
        self.bottom = convolutions(2 * width, 4 * width)
        self.narrow = nn.Conv2d(4 * width, 2 * width, 1)
        self.third = convolutions(4 * width, 2 * width)
        self.thin = nn.Conv2d(2 * width, width, 1)
        self.last = nn.Sequential(convolutions(2 * width, width), nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images without their noise, of the shape of x."""
        fine = self.first(x)
        coarse = self.second(F.max_pool2d(fine, 2))
        up = F.interpolate(self.narrow(self.bottom(F.max_pool2d(coarse, 2))), scale_factor=2.0)
        up = self.third(torch.cat([coarse, up], 1))
        up = F.interpolate(self.thin(up), scale_factor=2.0)
        return x - self.last(torch.cat([fine, up], 1))


@cache
def denoiser() -> Workload:
    """Windows of 24 × 24 pixels with normal noise (0.15 of the range) and without; a U-Net.

    The mean square error is in units of the noise's variance: 1 is the error of doing nothing.
    """
    parts = zip(("train", "val", "test"), blocks().split((360, 60, 100)), (2000, 500, 1000),
                (1, 2, 3), strict=True)  # fmt: skip
    splits: dict[str, Batch] = {}
    for name, found, count, seed in parts:
        clean = crops(found, count, 24, seed)
        generator = torch.Generator().manual_seed(10 + seed)
        noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
        splits[name] = noisy / NOISE, clean / NOISE
    return Workload(
        name="denoiser", criterion=F.mse_loss, make_model=UNet, splits=splits, batch_size=16,
        steps=500,
    )  # fmt: skip


class SineLayer(nn.Linear):
    """sin(ω (W x + b)) with the initial weights of the paper.

    Args:
        inputs: Size of x.
        outputs: Number of units.
        bound: Of the uniform initial weights.
        omega: ω.
    """

    def __init__(self, inputs: int, outputs: int, bound: float, omega: float = 30.0) -> None:
        super().__init__(inputs, outputs)
        self.omega = omega
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Activations, shape (batch, outputs)."""
        return torch.sin(self.omega * super().forward(x))


def sine_network(width: int = 64) -> nn.Module:
    """Coordinates to colours through three sine layers; 8,700 parameters.

    Source: Sitzmann et al. 2020 (SIREN), section 3.2 for the initial weights.
    """
    bound = math.sqrt(6 / width) / 30
    return nn.Sequential(
        SineLayer(2, width, 1 / 2), SineLayer(width, width, bound),
        SineLayer(width, width, bound), nn.Linear(width, 3),
    )  # fmt: skip


@cache
def sine_image() -> Workload:
    """The flower's middle, 128 × 128 pixels: half of them are fitted, a quarter validates."""
    image = photographs()[1, :, 150:278, 250:378]
    image = (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True)
    line = torch.linspace(-1, 1, 128)
    x = torch.cartesian_prod(line, line)
    y = image.permute(1, 2, 0).reshape(-1, 3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split((8192, 4096, 4096)), strict=True))
    return Workload(
        name="sine-image", criterion=F.mse_loss, make_model=sine_network, batch_size=256,
        steps=1500, splits={k: (x[p], y[p]) for k, p in parts.items()},
    )  # fmt: skip
