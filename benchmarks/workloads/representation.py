"""Representations of clothes: a vector-quantized autoencoder and a contrastive encoder."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided
from benchmarks.workloads.images import as_pixels, load_fashion_mnist

PIXELS, EMBEDDING = 784, 32
SIZES = (8000, 2000, 4000)


def _images() -> Tensor:
    """Rows of pixels in [0, 1]."""
    return as_pixels(load_fashion_mnist()[0][: sum(SIZES)].flatten(1))


class Quantized(nn.Module):
    """An autoencoder whose code is replaced by the nearest entries of a codebook.

    Args:
        entries: Entries of the codebook.
        size: Numbers in an entry.
        parts: Entries that encode an image.
        width: Units of the hidden layers.

    Source: van den Oord et al. 2017.
    """

    def __init__(self, entries: int = 64, size: int = 8, parts: int = 8, width: int = 128) -> None:
        super().__init__()
        self.parts = parts
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, parts * size)
        )
        self.codebook = nn.Parameter(0.5 * torch.randn(entries, size))
        self.decoder = nn.Sequential(
            nn.Linear(parts * size, width), nn.ReLU(), nn.Linear(width, PIXELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Pixels and, in the last column, the penalty on distances from the codebook."""
        code = self.encoder(x).unflatten(1, (self.parts, -1))
        entries = self.codebook.expand(len(code), -1, -1)
        nearest = self.codebook[torch.cdist(code.detach(), entries.detach()).argmin(2)]
        commitment = (code - nearest.detach()).square().mean((1, 2))
        attraction = (code.detach() - nearest).square().mean((1, 2))
        # The value is the entry's, the gradient passes straight through to the code.
        passed = code + (nearest - code).detach()
        penalty = 0.25 * commitment + attraction
        return torch.cat([self.decoder(passed.flatten(1)), penalty.unsqueeze(1)], 1)


def quantized_loss(outputs: Tensor, pixels: Tensor) -> Tensor:
    """Mean square error of the pixels plus the penalty."""
    return F.mse_loss(outputs[:, :-1], pixels) + outputs[:, -1].mean()


@cache
def vector_quantized() -> Workload:
    """A vector-quantized autoencoder of Fashion-MNIST."""
    x = _images()
    return Workload(
        name="vector-quantized", make_model=Quantized, splits=divided(x, x, SIZES), batch_size=64,
        steps=700, criterion=quantized_loss,
    )  # fmt: skip


class Encoder(nn.Module):
    """Unit vectors of two views of an image, and a learned inverse temperature.

    Args:
        width: Units of the hidden layer, before BatchNorm.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            *(nn.Linear(PIXELS, width), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, EMBEDDING),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, views: Tensor) -> Tensor:
        """Two vectors side by side and, in the last column, the inverse temperature."""
        first, second = (F.normalize(self.embed(view)) for view in views.split(PIXELS, 1))
        return torch.cat([first, second, self.log_scale.exp().expand(len(views), 1)], 1)


def info_nce(outputs: Tensor, _: Tensor) -> Tensor:
    """Cross-entropy of finding an image's other view among those of the batch, both ways.

    Source: van den Oord et al. 2018.
    """
    first, second, scale = outputs.split((EMBEDDING, EMBEDDING, 1), 1)
    logits = scale[0] * first @ second.T
    own = torch.arange(len(outputs), device=outputs.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


@cache
def contrastive() -> Workload:
    """Two views of Fashion-MNIST images, of other brightness, with noise and without 40 %."""
    x = _images()
    generator = torch.Generator().manual_seed(4)

    def view() -> Tensor:
        brightness = 0.6 + 0.8 * torch.rand(len(x), 1, generator=generator)
        noise = 0.15 * torch.randn(x.shape, generator=generator)
        return (x * brightness + noise) * (torch.rand(x.shape, generator=generator) > 0.4)

    return Workload(
        name="contrastive", make_model=Encoder, batch_size=128, steps=600, criterion=info_nce,
        splits=divided(torch.cat([view(), view()], 1), torch.zeros(len(x)), SIZES),
    )  # fmt: skip
