"""Regressions on synthetic data: counts, and a linear model of ill-conditioned inputs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided

SHIFT = 10.0
"""Added to the loss of counts, which could be negative, so that ratios of losses have a meaning."""


def count_loss(outputs: Tensor, counts: Tensor) -> Tensor:
    """Poisson negative log-likelihood of log rates, without its constant, plus a shift."""
    return F.poisson_nll_loss(outputs, counts, log_input=True) + SHIFT


@cache
def poisson() -> Workload:
    """Counts with a rate that is a nonlinear function of 5 of 12 inputs."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9000, 12, generator=generator)
    a, b, c, d, e = x[:, :5].unbind(1)
    rates = torch.exp(1.2 * a * b / (1 + c**2) + d - 0.5 * e.abs() + 0.5).clamp_max(200)
    counts = torch.poisson(rates, generator=generator).view(-1, 1)
    return Workload(
        name="poisson", batch_size=64, steps=1000, criterion=count_loss,
        splits=divided(x, counts, (5000, 1500, 2500)),
        make_model=lambda: nn.Sequential(
            nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        ),
    )  # fmt: skip


@cache
def ill_conditioned() -> Workload:
    """Linear regression on 40 inputs of scales from 1 to 0.01, condition number 10⁴.

    Mean square error, of which 0.01 is noise.
    """
    generator = torch.Generator().manual_seed(7)
    scales = torch.logspace(0, -2, 40)
    x = torch.randn(6000, 40, generator=generator) * scales
    weights = torch.randn(40, 1, generator=generator) / scales.view(-1, 1) / 6
    y = x @ weights + 0.1 * torch.randn(6000, 1, generator=generator)
    return Workload(
        name="ill-conditioned", make_model=lambda: nn.Linear(40, 1), batch_size=32, steps=1500,
        splits=divided(x, y, (4000, 500, 1500)), criterion=F.mse_loss,
    )  # fmt: skip
