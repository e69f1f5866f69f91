"""The guard: notices a run that has blown up or died, and says what to do about it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class Guard:
    """Watches gradients and losses; plain numbers, saved with the run.

    Args:
        patience: Consecutive non-finite gradients, or losses no better than at the start after
            progress was made, that are tolerated.
        explosion: A loss this many times the first one has exploded.
        limit: Roll-backs without progress after which learning rates are only cooled further.
    """

    patience: int = 3
    explosion: float = 2.0
    limit: int = 10
    skipped: int = 0
    first: float = math.nan
    best: float = math.inf
    lost: int = 0
    quiet: int = 0
    loud: float = 0.0
    rollbacks: int = 0
    mean: float = math.nan
    spread: float = 0.0
    count: int = 0
    weight: float = 0.1
    sigmas: float = 3.0
    tolerance: float = 0.1
    streak: int = 0

    def gradient(self, square_norm: float, alive: float | None = None) -> str:
        """Judge the square norm of a training gradient: "ok", "skip" or "rollback"."""
        if math.isfinite(square_norm):
            self.skipped = 0
            return "ok"
        self.skipped += 1
        return "rollback" if self.skipped >= self.patience else "skip"

    def pulse(self, nonzero: float) -> str:
        """Judge the share of weights with a gradient: a dead network has next to none."""
        self.loud = max(self.loud, nonzero)
        self.quiet = self.quiet + 1 if nonzero < 0.1 * self.loud else 0
        return "rollback" if self.quiet >= self.patience else "ok"

    def loss(self, loss: float) -> str:
        """Judge an outer loss: "best", "ok" or "rollback"."""
        if not math.isfinite(loss):
            return "rollback"
        if math.isnan(self.first):
            self.first = self.mean = loss
        self.count += 1
        weight = max(self.weight, 1 / self.count)
        self.spread += weight * ((loss - self.mean) ** 2 - self.spread)
        self.mean += weight * (loss - self.mean)
        if self.mean > self.first + (self.explosion - 1) * abs(self.first):
            return "rollback"
        noise = math.sqrt(self.spread * weight / (2 - weight))
        if self.mean > self.best + max(self.sigmas * noise, self.tolerance * (self.first - self.best)):
            return "rollback"
        if self.mean < self.best:
            self.best, self.streak = self.mean, 0
            return "best"
        return "ok"

    def rolled_back(self, why) -> float:
        """Count a roll-back; returns by how much to cool: more each time in a row."""
        self.rollbacks += 1
        self.streak += 1
        self.mean = min(self.best, self.first)
        self.skipped = self.lost = self.quiet = 0
        return math.log(3.0) * (1 if why.startswith('loss') else min(self.streak, self.limit))
