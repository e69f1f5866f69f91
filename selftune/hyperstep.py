"""The step of the hyperparameters: an optimizer on raw values, held to what is significant."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

HyperOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


RATE, BETAS, EPS = 0.01, (0.8, 0.98), 1e-8
"""Of Adam: steps of about 1 % in raw (log or odds) space for every training step since the last."""
OFTEN, RARE = 5, 20
"""Training steps from one hyper step to the next between which its size grows."""
FEWEST = 30
"""Hyper steps in a run of known length."""
SHORT, POWER = 1000, 0.5
"""Steps in a run below which hyper steps are larger, and with which power of the length."""
RECENT = 0.8
"""Memory of the signal-to-noise ratio: about five estimates."""
SURE = 2.0
"""How far above that of noise the ratio must be for whole steps."""
LONGEST = 0.3
"""Largest change of a raw value in one step."""


def usual_every(total_steps: int | None) -> int:
    """Training steps from one hyper step to the next: a thirtieth of the run, from 5 to 20.

    Examples:
        >>> usual_every(None), usual_every(300), usual_every(10_000)
        (5, 10, 20)
    """
    return OFTEN if total_steps is None else max(OFTEN, min(RARE, total_steps // FEWEST))


def step_size(every: int, total_steps: int | None = None) -> float:
    """The size of a hyper step: rarer ones are larger, so that a run travels as far.

    Below 1000 steps, T in the whole run, they are √(1000/T) times as large: short runs have no time
    for small ones.

    Examples:
        >>> step_size(5), step_size(1000), step_size(10, 250)
        (0.05, 0.2, 0.2)
    """
    shorter = 1.0 if total_steps is None else max(1.0, SHORT / max(1, total_steps))
    return RATE * max(OFTEN, min(RARE, every)) * shorter**POWER


def adam(
    raw: Iterable[Tensor], every: int = OFTEN, total_steps: int | None = None
) -> torch.optim.Optimizer:
    """The default hyper optimizer."""
    return torch.optim.Adam(raw, lr=step_size(every, total_steps), betas=BETAS, eps=EPS)


def signal_to_noise(mean: Tensor, square: Tensor) -> Tensor:
    """|mean| / root mean square of recent hypergradients: 0 (noise) … 1 (all alike)."""
    return mean.abs() / square.sqrt().clamp_min(1e-300)


def trust(mean: Tensor, square: Tensor) -> Tensor:
    """How much of a proposed step is taken: all where estimates agree, little for noise.

    Over estimates of pure noise the ratio is about √((1 − β)/(1 + β)); below ``SURE`` times
    that the step shrinks with the square of the ratio.
    """
    noise = math.sqrt((1 - RECENT) / (1 + RECENT))
    return (signal_to_noise(mean, square) / (SURE * noise)).square().clamp_max(1.0)


class HyperStep:
    """Moves the vector of raw shifts along hypergradients.

    A step is what the optimizer proposes, scaled down where the hypergradients of the recent
    past disagree, bounded in length, and stopped at the bounds. Nothing saturates there: a
    hyperparameter at its bound leaves it at the first step that points inward.

    Args:
        pace: Relative step size of each shift, shape (shifts,).
        make: Builds a torch optimizer over the one raw parameter.
        longest: Largest change of a raw value in one step.

    Attributes:
        raw: The shifts, shape (shifts,), float64.
        mean: Running mean of the hypergradient.
        square: Running mean of its square.
    """

    def __init__(self, pace: Tensor, make: HyperOptimizer = adam, longest: float = LONGEST) -> None:
        """Start from shifts of zero."""
        self.pace = pace
        self.raw = torch.zeros_like(pace, requires_grad=True)
        self.optimizer = make([self.raw])
        self.longest = longest
        self.mean = torch.zeros_like(pace)
        self.square = torch.zeros_like(pace)
        self.count = 0

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio |mean| / root mean square, 0 (noise) … 1 (all alike)."""
        return signal_to_noise(self.mean, self.square)

    def step(self, grads: Tensor, low: Tensor, high: Tensor, moving: Tensor | None = None) -> None:
        """Move the shifts against ``grads``, within ``low`` and ``high``.

        Args:
            grads: Hypergradients, shape (shifts,).
            low: Lowest shifts.
            high: Highest shifts.
            moving: Which shifts have a hypergradient at all; the others stay. None: all.

        Raises:
            ValueError: Hypergradients that are not finite; nothing is moved.
        """
        if not bool(torch.isfinite(grads).all()):
            raise ValueError(f"hypergradients must be finite, got {grads.tolist()}")
        moving = torch.ones_like(grads, dtype=torch.bool) if moving is None else moving
        self.count += 1
        weight = (1 - min(RECENT, 1 - 1 / self.count)) * moving.to(grads.dtype)
        self.mean.lerp_(grads, weight)
        self.square.lerp_(grads.square(), weight)
        before = self.raw.detach().clone()
        self.raw.grad = grads * moving
        self.optimizer.step()
        self.raw.grad = None
        with torch.no_grad():
            proposed = (self.raw - before) * trust(self.mean, self.square) * self.pace
            after = before + proposed.clamp(-self.longest, self.longest)
            self.raw.copy_(torch.where(moving, after, before).maximum(low).minimum(high))

    def reset(self) -> None:
        """Forget the past hypergradients; the shifts stay."""
        self.mean.zero_()
        self.square.zero_()
        self.count = 0
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "raw": self.raw.detach().clone(),
            "mean": self.mean.clone(),
            "square": self.square.clone(),
            "count": self.count,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        with torch.no_grad():
            self.raw.copy_(state["raw"])
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.count = state["count"]
        self.optimizer.load_state_dict(state["optimizer"])
