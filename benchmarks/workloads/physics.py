"""Physics: a network that solves Burgers' equation, trained on the equation's residual."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Batch, Workload

VISCOSITY = 0.05


class Burgers(nn.Module):
    """u(x, t) of a tanh network, or the residual u_t + u u_x − ν u_xx at points that request it.

    Derivatives are carried forward through the layers: for a = tanh(z), with s = 1 − a²,
    a_x = s z_x, a_t = s z_t and a_xx = s (z_xx − 2 a z_x²).

    Args:
        width: Units of each hidden layer.
        depth: Number of hidden layers.

    Source: Raissi, Perdikaris & Karniadakis 2019.
    """

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        sizes = [2] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(width, 1)

    def forward(self, points: Tensor) -> Tensor:
        """Shape (batch, 1).

        Args:
            points: x, t, and 1 to request the residual, else 0; shape (batch, 3).
        """
        place, inside = points[:, :2], points[:, 2:]
        along = torch.zeros_like(place)
        # shape (4, batch, units): z, z_x, z_t, z_xx
        z = torch.stack([place, along + along.new_tensor([1.0, 0.0]),
                         along + along.new_tensor([0.0, 1.0]), along])  # fmt: skip
        for layer in self.hidden:
            z = self._affine(layer, z)
            a = torch.tanh(z[0])
            slope = 1 - a**2
            z = torch.stack([a, slope * z[1], slope * z[2], slope * (z[3] - 2 * a * z[1] ** 2)])
        u, u_x, u_t, u_xx = self._affine(self.last, z)
        residual = u_t + u * u_x - VISCOSITY * u_xx
        return torch.where(inside > 0, residual, u)

    @staticmethod
    def _affine(layer: nn.Linear, z: Tensor) -> Tensor:
        """W z of all four rows, and b added to the value: the derivative of b is 0."""
        linear = F.linear(z, layer.weight)
        return torch.cat([linear[:1] + layer.bias, linear[1:]])


def _points(count: int, seed: int) -> Batch:
    """Points in space and time: two thirds inside, a sixth at t = 0 and a sixth at x = ±1."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(count, generator=generator) - 1
    t = torch.rand(count, generator=generator)
    part = torch.randint(6, (count,), generator=generator)
    t = torch.where(part == 4, torch.zeros_like(t), t)
    x = torch.where(part == 5, x.sign(), x)
    y = torch.where(part == 4, -torch.sin(math.pi * x), torch.zeros_like(x))
    return torch.stack([x, t, (part < 4).float()], 1), y.view(-1, 1)


@cache
def burgers() -> Workload:
    """u_t + u u_x = 0.05 u_xx from −sin πx between walls where u = 0; mean square residual."""
    sizes = {"train": 2000, "val": 1000, "test": 4000}
    return Workload(
        name="burgers", criterion=F.mse_loss, make_model=Burgers, batch_size=128, steps=1500,
        splits={n: _points(count, seed) for seed, (n, count) in enumerate(sizes.items())},
    )  # fmt: skip
