"""Jobs with choices, which tests of both drivers share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune.structure import Choice, Gate


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def job() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A sine, among activations of which one is a sine."""
    torch.manual_seed(0)
    x = torch.rand(400, 1) * 12 - 6
    choice = Choice([nn.ReLU(), Sine(), nn.Identity()])
    return nn.Sequential(nn.Linear(1, 6), choice, Gate(6), nn.Linear(6, 1)), x, x.sin()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def wide_job() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A choice of four branches with units of their own."""
    torch.manual_seed(2)
    x = torch.randn(400, 4)
    branches = [nn.Sequential(nn.Linear(4, 16), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(Choice(branches), nn.Linear(16, 1)), x, x[:, :1].sin() * x[:, 1:2]
