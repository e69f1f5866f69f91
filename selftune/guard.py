"""The guard: notices a run that has blown up, died or begun to over-fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

NOISY = 4.0
"""Of the first ten training losses' spread, what another zero of the loss must not matter for."""
FRESH = 5
"""Running means of so few evaluations only set the yardstick."""
WINDOW = 5
"""Losses whose mean judges the weights of the middle one. A running mean tells too late: it is
lowest where the loss has risen again."""


@dataclass(kw_only=True)
class Guard:
    """Watches gradients and losses; its state is plain numbers, saved with the run.

    Every judgement is one of ``"ok"``, ``"hold"`` (what comes will tell whether these weights are
    good), ``"best"`` (those that are held are), ``"skip"`` (ignore this step) and ``"rollback"``
    (return to the last good weights).

    Args:
        patience: Consecutive non-finite gradients, or near-empty ones, that are tolerated.
        explosion: The smoothed loss has exploded once it exceeds the first by this factor.
        sigmas: The smoothed outer loss has worsened when it is this many standard errors …
        tolerance: … and this share of the progress made …
        least: … and this share of the first loss above its best.
        limit: Roll-backs in a row after which cooling grows no more, and the first loss is
            measured anew.
    """

    patience: int = 3
    explosion: float = 2.0
    sigmas: float = 2.5
    tolerance: float = 0.05
    least: float = 0.02
    limit: int = 10

    start: float = math.nan
    noise: float = 0.0  # what may be above the start without an alarm, since it once was
    first: float = math.nan
    mean: float = math.nan
    spread: float = 0.0
    count: int = 0
    best: float = math.inf
    best_error: float = 0.0
    window: int = 0
    total: float = 0.0
    lowest: float = math.inf
    training_first: float = math.nan
    training_mean: float = math.nan
    training_count: int = 0
    training_spread: float = 0.0
    skipped: int = 0
    missed: int = 0
    quiet: int = 0
    loudest: float = 0.0
    streak: int = 0
    rollbacks: int = 0
    exploded: bool = False  # or the last outer loss only worsened, if it was worth a roll-back

    _weight = 0.1  # of the newest loss in the running means: about ten evaluations

    def gradient(self, square_norm: float) -> str:
        """Judge a training gradient by its square norm."""
        if math.isfinite(square_norm):
            self.skipped = 0
            return "ok"
        self.skipped += 1
        return "rollback" if self.skipped >= self.patience else "skip"

    def pulse(self, alive: float) -> str:
        """Judge the number of weights whose gradient is not 0: a dead network has next to none.

        So has one that has learned all there is (a hinge loss at its margin), so a run whose
        loss has come down is not judged.
        """
        self.loudest = max(self.loudest, alive)
        self.quiet = self.quiet + 1 if alive < 0.1 * self.loudest else 0
        learned = self.first - self.best > 0.1 * abs(self.first) or (
            self.training_first - self.training_mean > 0.1 * abs(self.training_first)
        )
        return "rollback" if self.quiet >= self.patience and not learned else "ok"

    def training_loss(self, loss: float) -> str:
        """Judge a training loss by its running mean: it may rise, but not explode."""
        if not math.isfinite(loss):
            self.missed += 1
            return "rollback" if self.missed >= self.patience else "skip"
        self.missed = 0
        self.training_count += 1
        weight = max(self._weight, 1 / self.training_count)
        if math.isnan(self.training_mean):
            self.training_mean = loss
        off = loss - self.training_mean
        self.training_mean += weight * off
        if self.training_count <= 10:  # a single batch may be lucky
            self.training_first = self.training_mean
            self.training_spread += weight * (off * off - self.training_spread)
        noise = NOISY * math.sqrt(self.training_spread)
        return (
            "rollback" if self._exploded(self.training_mean - noise, self.training_first) else "ok"
        )

    def begin(self, loss: float) -> None:
        """Take the outer loss at the good weights of the start, which others are held against."""
        if math.isnan(self.start) and math.isfinite(loss):
            self.start = loss

    def loss(self, loss: float) -> str:
        """Judge a loss at the outer point by its running mean.

        The lowest of many noisy means lies below the truth, and the first few have no error to
        speak of: both means' errors count, and no alarm is given before ten evaluations.
        """
        self.exploded = not math.isfinite(loss)
        if self.exploded:
            return "rollback"
        self.begin(loss)
        if math.isnan(self.mean):
            self.mean = loss
        self.count += 1
        weight = max(self._weight, 1 / self.count)
        self.spread += weight * ((loss - self.mean) ** 2 - self.spread)
        self.mean += weight * (loss - self.mean)
        self.exploded = self._exploded(self.mean - self.noise, self.start)
        if self.exploded:
            return "rollback"
        if math.isnan(self.first):
            self.first = loss
        error = math.sqrt(self.spread * weight / (2 - weight))
        slack = max(
            self.sigmas * math.hypot(error, self.best_error),
            self.tolerance * (self.first - self.best),
            self.least * abs(self.first),
        )
        # After an alarm that led to nothing better the next must be surer.
        if self.count > 10 and self.mean > self.best + slack * (1 + self.streak / 2):
            return "rollback"
        # The first means set the yardstick; only what beats the start is worth returning to.
        bar = self.start + self.least * abs(self.start)
        better = self.mean < min(self.best, bar)
        if better or self.count <= FRESH:
            self.best, self.best_error = self.mean, error
        if better:
            self.streak = 0
        return self._windowed(loss, bar)

    def _windowed(self, loss: float, bar: float) -> str:
        """Whether weights are to be held, or those that are held are the best so far."""
        self.window, self.total = self.window + 1, self.total + loss
        if self.window < WINDOW:
            return "hold" if self.window == (WINDOW + 1) // 2 else "ok"
        mean = self.total / WINDOW
        self.window, self.total = 0, 0.0
        if mean >= min(self.lowest, bar):
            return "ok"
        self.lowest = mean
        return "best"

    def confirms(self, now: float, good: float, error: float = 0.0) -> bool:
        """Whether losses over many batches bear out that the outer loss has worsened.

        If not, the alarm was one of the noise: the running mean begins anew, from what is known.

        Args:
            now: At the present outer point.
            good: At the good weights, over the same batches or as many others.
            error: Standard error of their difference; 0 where batches are the same.
        """
        first = self.start if math.isnan(self.first) else self.first
        slack = max(self.tolerance * (first - good), self.least * abs(first), self.sigmas * error)
        if not now <= good + slack:
            return True
        if self.exploded:  # the yardstick was a lucky batch, or noise beside a loss near 0
            above = self.mean - max(self.start, good)
            self.start, self.exploded = max(self.start, good), False
            self.noise = max(self.noise, self.explosion * above)
        self.best = self.lowest = min(now, good)
        self.best_error = 0.0
        self.mean = now
        self.count = FRESH
        self.window, self.total = 0, 0.0
        return False

    def _exploded(self, mean: float, first: float) -> bool:
        return mean > first + (self.explosion - 1) * max(abs(first), 1e-6)

    def rolled_back(self, *, worsened: bool) -> float:
        """Count a roll-back; returns by how much, in log lr, to cool.

        A loss that merely worsened cools by a factor of 2; blow-ups in a row cool by 3, 9, 27, …
        so that a run cannot be rolled back for ever.
        """
        self.rollbacks += 1
        self.streak += 1
        self.mean = self.best if math.isfinite(self.best) else math.nan
        self.window, self.total = 0, 0.0
        self.training_mean = self.training_first = math.nan
        self.training_count = 0
        self.skipped = self.missed = self.quiet = 0
        if self.streak >= self.limit:  # cooling does not help, so the yardstick must be wrong
            self.start = self.mean = math.nan
        return math.log(2.0) if worsened else math.log(3.0) * min(self.streak, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value)
