"""The start-up probe: a sweep of the learning rate that finds where descent ends.

Over the first few steps the rate climbs by equal ratios through eight decades around the given
one. After each step the next gradient tells the slope of the loss at the end of that step,
``s = g₊ · Δw``, on a batch the step has not seen. While the slope is downhill a longer step
would have been better; where it turns uphill the rate has gone too far. The sum of the slopes,
``C = Σ s``, estimates the change of the loss (a Riemann sum along the path), so the rate at
which C is lowest is the largest that still descends. It needs no loss and no extra pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class Probe:
    """The sweep's state: plain numbers, saved with the run.

    Args:
        steps: Length of the sweep at most; it ends early once the rate is plainly too high.
        decades: Reach of the sweep on either side of the given rate.
        margin: The chosen rate is the largest descending one divided by this.
        keep: The given rate is kept if it is at most this factor below the chosen one, and not
            above the largest descending one.
    """

    steps: int
    decades: float = 4.0
    margin: float = 3.0
    keep: float = 10.0
    taken: int = 0
    change: float = 0.0
    lowest: float = 0.0
    best: float = math.nan
    uphill: int = 0
    ended: bool = False

    @property
    def factor(self) -> float:
        """What the given rate is multiplied with at the present step."""
        progress = self.taken / max(1, self.steps - 1)
        return 10.0 ** (self.decades * (2 * progress - 1))

    def observe(self, slope: float) -> bool:
        """Take in the slope at the end of the step before; true where C is the lowest so far."""
        last = 10.0 ** (self.decades * (2 * (self.taken - 1) / max(1, self.steps - 1) - 1))
        self.change += slope
        if not math.isfinite(self.change):
            self.ended = True
            return False
        self.uphill = self.uphill + 1 if self.change > 0 else 0
        if self.uphill >= 2 or self.taken >= self.steps:
            self.ended = True
        if self.change < self.lowest:
            self.lowest, self.best = self.change, last
            return True
        return False

    @property
    def choice(self) -> float:
        """The factor for the given rate; 1 keeps it."""
        if math.isnan(self.best):
            return 1.0
        chosen = self.best / self.margin
        return 1.0 if chosen / self.keep <= 1.0 <= self.best else chosen
