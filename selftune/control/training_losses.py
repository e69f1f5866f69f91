"""Running statistics of the training loss."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class TrainingLosses:
    """Running mean of the training loss, and what it is compared with; plain numbers.

    Attributes:
        start: Highest loss at the start of the sweep; NaN if there is none.
        low: Lowest loss at the start of the sweep.
        first: Lowest mean of the first ten losses, or the start; NaN before the first loss.
        scale: Highest absolute value of ``start`` and ``first`` so far.
        mean: Running mean; NaN before the first loss.
        count: Number of losses since the start or the last rewind.
        spread: Variance of the first ten losses.
        restored: Whether the next loss is that of the good weights.
    """

    start: float = math.nan
    low: float = math.inf
    first: float = math.nan
    scale: float = 0.0
    mean: float = math.nan
    count: int = 0
    spread: float = 0.0
    restored: bool = False

    def begin(self, loss: float) -> None:
        """Record a loss at the start of the sweep."""
        self.start = loss if math.isnan(self.start) else max(self.start, loss)
        self.low = min(self.low, loss)
        self.scale = max(self.scale, abs(self.start))

    def observe(self, loss: float, memory: float) -> None:
        """Record a loss.

        Args:
            loss: The loss.
            memory: Weight of the newest loss in the running mean.
        """
        if self.restored:  # the loss of the good weights: no sign of a divergence
            self.restored = False
            self.start = max(self.start, loss)  # stays NaN if unknown
        self.count += 1
        weight = max(memory, 1 / self.count)
        if math.isnan(self.mean):
            self.mean = loss
        off = loss - self.mean
        self.mean += weight * off
        if self.fresh:  # a single batch may be lucky
            known = (self.mean, self.start)
            self.first = min(x for x in known if not math.isnan(x))
            self.scale = max(self.scale, abs(self.first))
            self.spread += weight * (off * off - self.spread)

    @property
    def fresh(self) -> bool:
        """Whether these are the first ten losses; their spread may include a divergence."""
        return self.count <= 10

    def restart(self) -> None:
        """Forget the mean, because the next loss is that of other weights."""
        self.first = self.mean = math.nan
        self.count, self.restored = 0, True
