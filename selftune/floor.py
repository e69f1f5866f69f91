"""The floor under weight decay, below which it does next to nothing.

There its hypergradient is noise, and a decay that has drifted far down is not back in time when
over-fitting begins. On the floor decay follows the learning rate: what a step shrinks, η λ, stays
as it is, and the rate's hypergradient answers for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from selftune.hparams import Hparam
from selftune.rules import AbstractRule
from selftune.schedules import HORIZON, Schedule

SHRINKAGE = 0.3
"""Least sum of η_t λ over a run, where weight decay acts on weights directly."""
L2_SHRINKAGE = 0.03
"""The same where it acts through the gradient, which momentum accumulates: η/(1 − μ) counts."""
HIGHEST = 0.1
"""The floor is at most this share of the upper bound."""
TOUCHING = 0.01
"""A weight decay that is above its floor by so little, in its logarithm, lies on it."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least weight decay, ``λ ≥ s / Σ η_t``: by itself it shrinks weights by e⁻ˢ in a run.

    Args:
        shrinkage: s.
        mean: Mean factor of the learning rate's schedule.
        total_steps: Steps in the run; None: not known, so as many as were taken, and 1000 at least.

    Examples:
        >>> round(Floor(shrinkage=0.3, mean=0.5, total_steps=1000).least(0.01), 6)
        0.06
    """

    shrinkage: float = SHRINKAGE
    mean: float = 1.0
    total_steps: int | None = None

    @classmethod
    def of(cls, rule: AbstractRule, schedule: Schedule) -> Floor | None:
        """That of a rule; None where weight decay does not shrink weights in proportion."""
        if not rule.shrinks:
            return None
        return cls(
            shrinkage=SHRINKAGE if rule.decoupled else L2_SHRINKAGE,
            mean=schedule.mean,
            total_steps=schedule.total_steps,
        )

    def least(self, rate: Any, steps: int = 0) -> Any:
        """The least weight decay at a learning rate, a number or a tensor.

        Args:
            rate: The peak, over 1 − μ where momentum accumulates decay.
            steps: Taken so far.
        """
        return self.shrinkage / (rate * self.mean * (self.total_steps or max(HORIZON, steps)))

    @staticmethod
    def highest(weight_decay: Hparam) -> float:
        """Where the floor ends, however low the rate."""
        return HIGHEST * weight_decay.upper

    @staticmethod
    def touched(above: Any) -> Any:
        """Whether a weight decay, whose logarithm is ``above`` that of its floor, lies on it."""
        return above <= math.log1p(TOUCHING)
