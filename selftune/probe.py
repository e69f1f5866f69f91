"""The start-up probe: a sweep of the learning rate that finds where descent ends.

Over the first few steps the rate climbs by equal ratios through eight decades around the given
one. After each step the next gradient tells the slope of the loss at the end of that step,
``s = g₊ · Δw``, on a batch the step has not seen. While the slope is downhill a longer step
would have been better; where it turns uphill the rate has gone too far. The sum of the slopes,
``C = Σ s``, estimates the change of the loss (a Riemann sum along the path), so the rate at
which C is lowest is the largest that still descends. It needs no loss and no extra pass. The rate
chosen is then on trial for a few steps: one that loses much of the descent again, or whose first
steps end far uphill, is lowered.

A short run goes on from there with less memory in β₁, which no slope of single steps can tell.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

NEAR = 4.0
"""How far above the best rate so far, or else at the next one, any descent counts."""


CALM, LEAST = 300, 3
"""How many times β₁'s memory 1/(1 − β₁) must fit into a run that begins, but for so few gradients:
runs of some hundred steps end lower with three than with the usual ten (docs/ablations.md), which
hypergradients are too short-sighted to see. The sweep itself takes what is given: with less
momentum its slopes are noisier."""
SETTLING = 10
"""Steps after the sweep in which the chosen rate must not lose what was found."""
LOSABLE = 0.5
"""How much of the descent it may lose."""
LANDING, OVERSHOT = 3, 10.0
"""Steps whose ends together may not lead uphill by so many times the descent that was found."""


def calming(beta1: float, total_steps: int | None) -> float:
    """How far β₁ is moved after a probe, in raw space; 0 if it is low enough.

    Args:
        beta1: Where it is.
        total_steps: Steps in the run; where they are not known it stays.

    Examples:
        >>> round(calming(0.9, 1500), 3), calming(0.9, 6000)
        (-0.693, 0.0)
    """
    if total_steps is None:
        return 0.0
    return min(0.0, math.log((1 - beta1) * max(LEAST, total_steps / CALM)))


def probe_steps(total_steps: int | None) -> int:
    """Length of a probe: 5 % of the run, 8 to 100 steps; none in a run under 80; 25 if unknown."""
    if total_steps is None:
        return 25
    return 0 if total_steps < 80 else max(8, min(100, total_steps // 20))


@dataclass(kw_only=True)
class Probe:
    """The sweep's state: plain numbers, saved with the run.

    Args:
        steps: Length of the sweep at most; it ends once the rate is plainly too high.
        decades: Reach of the sweep on either side of the given rate.
        margin: The chosen rate is the largest descending one divided by this.
    """

    steps: int
    decades: float = 4.0
    margin: float = 1.5

    taken: int = 0
    change: float = 0.0
    lowest: float = 0.0
    best: float = math.nan
    balance: int = 0
    seen: bool = False
    uphill: int = 0
    ended: bool = False
    settled: int = 0
    lost: float = 0.0
    uphill_at_ends: float = 0.0

    def __post_init__(self) -> None:
        """Check the length."""
        if self.steps < 2:
            raise ValueError(f"probe={self.steps} must be at least 2 steps, or False for none")

    def factor(self, step: int) -> float:
        """What the given rate is multiplied with at a step of the sweep."""
        return 10.0 ** (self.decades * (2 * step / (self.steps - 1) - 1))

    def observe(self, slope: float) -> bool:
        """Take in the slope at the end of the last step; true where C is the lowest so far.

        At rates too small to matter two batches' slopes may differ in sign by chance, so the
        sweep ends only after descent has been seen: three more downhill steps than uphill.
        And where the loss has reached a plateau that large steps do not leave, the sum wanders
        by chance. Further descent counts if it comes at a rate not far above the best so far, or if
        it is as much again.
        """
        if not math.isfinite(slope):
            self.ended = True
            return False
        self.change += slope
        self.balance += 1 if slope < 0 else -1
        self.seen = self.seen or self.balance >= 3
        self.uphill = self.uphill + 1 if self.seen and self.change > 0 else 0
        if self.uphill >= 2 or self.taken >= self.steps:
            self.ended = True
        rate = self.factor(self.taken - 1)
        near = max(NEAR, 1.01 * self.factor(1) / self.factor(0)) * self.best
        if self.change < self.lowest * (2.0 if rate > near else 1.0):
            self.lowest, self.best = self.change, rate
            return True
        return False

    @property
    def settling(self) -> bool:
        """Whether the chosen rate is still on trial."""
        return self.ended and self.lowest < 0 and self.settled < SETTLING

    def settle(self, start: float, end: float) -> bool:
        """Take in a step at the chosen rate; true where the rate is to be lowered.

        A rate that descended once, on the way to higher ones, may blow up when it stays: it loses
        much of the descent, or its first steps end far up the other side of a valley. (The slope at
        the start is that of the batch that made the step. Where steps are far too long it is so
        steep that losses look like gains; the slope at the end is of another batch.)

        Args:
            start: The slope along the step where it begins, g · Δw.
            end: That where it ends.
        """
        self.settled += 1
        self.lost += (start + end) / 2  # the trapezoidal rule
        if self.settled <= LANDING:
            self.uphill_at_ends += end
        loses = self.lost > -LOSABLE * self.lowest
        if not (loses or self.uphill_at_ends > -OVERSHOT * self.lowest):
            return False
        self.settled, self.lost, self.uphill_at_ends = 0, 0.0, 0.0
        return True

    @property
    def choice(self) -> float:
        """The factor for the given rate; 1, which keeps it, if nothing descended."""
        return 1.0 if math.isnan(self.best) else self.best / self.margin

    def moves(self, beta1: float, total_steps: int | None) -> dict[str, float]:
        """By how much raw values change at the end, by name.

        Args:
            beta1: Where β₁ is.
            total_steps: Steps in the run, or None.
        """
        return {"lr": math.log(self.choice), "beta1": calming(beta1, total_steps)}

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value)
