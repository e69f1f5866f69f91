"""Dynamics: a network as the velocity field of a pendulum, fitted to whole trajectories."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided

TIME, STEP = 20, 0.1


def midpoint(field: Callable[[Tensor], Tensor], state: Tensor, step: float) -> Tensor:
    """The state one step later, by the midpoint rule."""
    return state + step * field(state + 0.5 * step * field(state))


class Trajectory(nn.Module):
    """The states after each of 20 steps along a learned velocity field.

    Args:
        width: Units of the field's hidden layer.

    Source: Chen et al. 2018.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, state: Tensor) -> Tensor:
        """Shape (batch, 20, 2), from the first states."""
        states = []
        for _ in range(TIME):
            state = midpoint(self.field, state, STEP)
            states.append(state)
        return torch.stack(states, 1)


def swing(state: Tensor) -> Tensor:
    """The velocity of a damped pendulum: θ' = ω, ω' = −2 sin θ − 0.2 ω."""
    angle, speed = state.unbind(1)
    return torch.stack([speed, -2 * torch.sin(angle) - 0.2 * speed], 1)


@cache
def pendulum() -> Workload:
    """3,000 trajectories of a damped pendulum over two seconds; mean square error."""
    first = 4 * torch.rand(6000, 2, generator=torch.Generator().manual_seed(1)) - 2
    state, states = first.double(), []
    for _ in range(TIME):
        for _ in range(10):
            state = midpoint(swing, state, STEP / 10)
        states.append(state)
    return Workload(
        name="pendulum", make_model=Trajectory, batch_size=64, steps=600, criterion=F.mse_loss,
        splits=divided(first, torch.stack(states, 1).float(), (3000, 1000, 2000)),
    )  # fmt: skip
