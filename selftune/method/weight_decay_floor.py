"""The weight decay floor, below which weight decay has hardly any effect.

Below it the hypergradient is noise, and a weight decay that has drifted far below does not recover
in time when overfitting begins.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from selftune.method.settings import FloorSettings
from selftune.rules import AbstractRule
from selftune.schedules import HORIZON, Schedule


@dataclass(frozen=True, kw_only=True)
class WeightDecayFloor:
    """The minimum weight decay, ``λ ≥ s / Σ η_t``, which scales weights by e⁻ˢ over a run.

    Args:
        shrinkage: s.
        mean: Mean factor of the learning rate's schedule.
        total_steps: Steps in the run; if None, the steps taken, but at least 1000.
        settings: Settings of the floor.

    Examples:
        >>> round(WeightDecayFloor(shrinkage=0.3, mean=0.5, total_steps=1000).least(0.01), 6)
        0.06
    """

    shrinkage: float = 0.0
    mean: float = 1.0
    total_steps: int | None = None
    settings: FloorSettings = field(default_factory=FloorSettings)

    @classmethod
    def of(
        cls,
        rule: AbstractRule,
        schedule: Schedule,
        settings: FloorSettings | None,
        bounds: Collection[str] | None = None,
    ) -> WeightDecayFloor | None:
        """The floor of a rule, or None: weight decay has ``bounds``, or shrinks no weights."""
        if settings is None or not rule.shrinks or "weight_decay" in (bounds or ()):
            return None
        made = cls(mean=schedule.mean, total_steps=schedule.total_steps, settings=settings)
        return made.under(rule)

    def under(self, rule: AbstractRule) -> WeightDecayFloor:
        """The floor for the rest of the run with another rule that shrinks weights."""
        settings = self.settings
        return replace(self, shrinkage=settings.decoupled if rule.decoupled else settings.l2)

    def least(self, rate: Any, steps: int = 0) -> Any:
        """The minimum weight decay at a learning rate, a number or a tensor.

        Args:
            rate: Peak learning rate, divided by 1 − μ if momentum accumulates decay.
            steps: Steps taken.
        """
        return self.shrinkage / (rate * self.mean * (self.total_steps or max(HORIZON, steps)))
