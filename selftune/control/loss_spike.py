"""Lasting spikes of the validation loss, which undo its descent."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FEW = 3
"""Number of consecutive losses that show a spike."""


@dataclass(kw_only=True)
class LossSpike:
    """Detects a lasting spike of the validation loss within a few losses.

    Units may die, or weights collapse, while the loss stays finite and below twice its first value.
    A mean over ten losses shows it after up to ten, a third of a short run, and its standard error
    contains the descent before. Here the variance of a loss is estimated by the differences of
    consecutive losses, ``σ² = Σ (lₜ − lₜ₋₁)² / 2n``, except the largest: a descent is only a small
    part of it.

    Attributes:
        low: Lowest mean of a few consecutive losses.

    Source: J. von Neumann et al. 1941, The mean square successive difference.
    """

    low: float = math.inf

    def observe(
        self, recent: Sequence[float], first: float, *, share: float, sigmas: float, least: float
    ) -> bool:
        """Return whether the last few losses are all above the lowest mean by these thresholds.

        Args:
            recent: The most recent losses, the last one new.
            first: The first loss.
            share: Share of the descent from the first loss that is undone.
            sigmas: Minimum rise in standard errors of a single loss.
            least: Minimum rise.

        Examples:
            >>> spike, losses = LossSpike(), [1.0, 0.9, 0.8, 0.7, 0.6, 1.0, 1.0, 1.0]
            >>> [
            ...     spike.observe(losses[: n + 1], 1.0, share=0.5, sigmas=4.0, least=0.02)
            ...     for n in range(8)
            ... ]
            [False, False, False, False, False, False, False, True]
        """
        last = recent[-FEW:]
        if len(last) < FEW:
            return False
        self.low = min(self.low, statistics.fmean(last))
        steps = sorted(abs(b - a) for a, b in itertools.pairwise(recent))[:-1]  # without the spike
        noise = math.hypot(*steps) / math.sqrt(2 * len(steps))
        rise = max(share * (first - self.low), sigmas * noise, least)
        return min(last) > self.low + rise
