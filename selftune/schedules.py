"""Factors of the learning rate over time: η_t = lr · shape(t) · warmup(t) / (1 + αt).

The learning rate ``lr`` is the *peak*. The shapes are plain functions of the step, because only the
peak is tuned; ``inverse_time`` is differentiable in its coefficient α, which is a separate
hyperparameter (``decay``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from selftune._arguments import COUNT, NONE, OneOf, Whole, check

Scalar = TypeVar("Scalar", float, Tensor)

HORIZON = 1000
"""Assumed number of steps in a run of unknown length."""
POINTS = 1000
"""Largest number of steps at which the mean of a schedule is evaluated."""


def inverse_time(decay: Scalar, step: Any) -> Scalar:
    """The factor 1/(1 + αt), differentiable in α.

    Examples:
        >>> inverse_time(0.5, 2)
        0.5
    """
    return 1 / (1 + decay * step)


def constant(progress: float) -> float:
    """No decay: 1 at every step."""
    return 1.0


def linear(progress: float) -> float:
    """Linear from 1 to 0 over the run."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """Constant, then linear to 0 over the last 30 % (warm-up, stable, decay).

    Source: Hägele et al. 2024, section 3.
    """
    return min(1.0, (1 - progress) / 0.3)


def exponential(progress: float) -> float:
    """Exponential from 1 to 0.001."""
    return 0.001**progress


SHAPES = {f.__name__: f for f in (constant, linear, cosine, wsd, exponential)}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A shape of the learning rate, with a linear warm-up.

    Args:
        shape: One of ``"constant"``, ``"linear"``, ``"cosine"``, ``"wsd"``, ``"exponential"``; None
            for linear if ``total_steps`` is known, and constant otherwise.
        total_steps: The horizon: number of steps in the whole run, or None.
        warmup_steps: Steps of the linear warm-up.

    Raises:
        TypeError: A number of steps is not an integer.
        ValueError: The shape is unknown or needs a horizon, or the warm-up is negative or not
            shorter than the horizon.

    Examples:
        >>> schedule = Schedule(total_steps=100, warmup_steps=10)
        >>> schedule(0), schedule(10), schedule(55), schedule(100)
        (0.1, 1.0, 0.5, 0.0)
    """

    shape: str | None = None
    total_steps: int | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check the arguments against one another."""
        check({"total_steps": COUNT | NONE, "warmup_steps": Whole(least=0)}, vars(self))
        if self.shape is None:
            object.__setattr__(self, "shape", "linear" if self.total_steps else "constant")
        check({"schedule": OneOf(tuple(SHAPES))}, {"schedule": self.shape})
        if self.shape != "constant" and self.total_steps is None:
            raise ValueError(f"schedule={self.shape!r} needs a horizon: pass total_steps=")
        if not 0 <= self.warmup_steps < (self.total_steps or math.inf):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be 0 or more and below total_steps"
            )

    def __call__(self, step: int) -> float:
        """The factor at a step counted from 0; past the horizon, its last value."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return SHAPES[str(self.shape)](min(progress, 1.0))

    @property
    def mean(self) -> float:
        """The mean factor over the run; 1 if its length is unknown.

        Examples:
            >>> round(Schedule(total_steps=500).mean, 2)
            0.5
        """
        if self.total_steps is None:
            return 1.0
        count = min(POINTS, self.total_steps)
        return math.fsum(self(k * self.total_steps // count) for k in range(count)) / count
