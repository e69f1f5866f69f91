"""Generative models: a variational autoencoder and a mixture density network."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided
from benchmarks.workloads.images import as_pixels, load_fashion_mnist

CODE = 16
SHIFT = 3.0
"""Added to the density's loss, so that ratios of losses have a meaning."""


class VAE(nn.Module):
    """A variational autoencoder with one hidden layer on either side; samples in training only.

    Args:
        pixels: Inputs and outputs.
        width: Units of the hidden layers.

    Source: Kingma & Welling 2014.
    """

    def __init__(self, pixels: int = 784, width: int = 200) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * CODE)
        )
        self.decoder = nn.Sequential(nn.Linear(CODE, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the pixels and, in the last column, the divergence from N(0, I)."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        code = mean + (0.5 * log_variance).exp() * noise
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        return torch.cat([self.decoder(code), divergence.sum(1, keepdim=True)], 1)


def negative_bound(outputs: Tensor, pixels: Tensor) -> Tensor:
    """The negative evidence lower bound of an image, in nats."""
    logits, divergence = outputs[:, :-1], outputs[:, -1]
    errors = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
    return (errors.sum(1) + divergence).mean()


@cache
def vae() -> Workload:
    """A variational autoencoder of Fashion-MNIST."""
    x = as_pixels(load_fashion_mnist()[0].flatten(1))
    splits = divided(x, x, (10_000, 2000, 4000))
    return Workload(
        name="vae", make_model=VAE, splits=splits, batch_size=64, steps=800,
        criterion=negative_bound,
    )  # fmt: skip


def density_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of a mixture of Gaussians, without its constant, plus a shift."""
    weights, means, logs = outputs.chunk(3, 1)
    parts = F.log_softmax(weights, 1) - logs - 0.5 * ((y - means) / logs.exp()) ** 2
    return SHIFT - torch.logsumexp(parts, 1).mean()


@cache
def mixture_density() -> Workload:
    """A mixture of five Gaussians for the inverse of x = t + 0.3 sin 2πt.

    Source: Bishop 1994.
    """
    generator = torch.Generator().manual_seed(5)
    t = torch.rand(6000, 1, generator=generator)
    noise = 0.05 * torch.randn(6000, 1, generator=generator)
    x = t + 0.3 * torch.sin(2 * math.pi * t) + noise
    return Workload(
        name="mixture-density", splits=divided(x, t, (3000, 1000, 2000)), batch_size=64, steps=2000,
        make_model=lambda: nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 15)),
        criterion=density_loss,
    )  # fmt: skip
