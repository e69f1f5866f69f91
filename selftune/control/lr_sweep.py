"""The learning-rate sweep at the start (a range test).

Over the first steps of a run the rate rises geometrically through eight decades around the given
one, and further while the loss falls. After each step the next gradient gives the slope of the loss
at the end of that step, ``s = g₊ · Δw``, on a new batch. While the slope is negative a longer step
would have been better; once it is positive the rate is too high. The sum of the slopes,
``C = Σ s``, estimates the change of the loss (a Riemann sum along the path), so the rate at which C
is lowest is the largest that still descends. Along the next, too long step the slope is 0 at the
fraction ``τ = s₀ / (s₀ − s)`` if it changes linearly from ``s₀ = g · Δw`` to s; so the best rate
lies between the two. The sweep needs no loss and no extra pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from selftune._arguments import Settings
from selftune.control.records import Saved

FIRST = 3
"""Number of initial steps of a sweep, and of the first measured ones."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """Settings of the learning-rate sweep.

    Attributes:
        parts: Length of the run divided by that of the sweep.
        shortest: Minimum number of steps of the sweep.
        longest: Maximum number of steps of the sweep.
        fewest: Runs with fewer steps have no sweep.
        unknown: Length of the sweep in a run of unknown length.
        decades: Range of the sweep on either side of the given rate.
        stretch: While the descent is certain and continues, the sweep goes on above its range,
            to this multiple of its number of steps.
        margin: The selected rate is the largest descending one, interpolated, divided by this, or
            by the factor of its initial steps (RMSprop) if that is larger.
        interpolation: Position of the selected rate between the largest descending one and the
            one at which the slope is 0, divided by ``margin²``, on a logarithmic scale. It changes
            nothing in sweeps of 24 steps or more, whose rates are close.
        near: Up to this factor above the best rate so far, or at the next rate, any descent
            counts; farther above, C must be below twice its minimum so far, and a descent that was
            certain must not be below the share ``real`` while most slopes are negative.
        rise: The loss counts as rising if C exceeds this multiple of the slope at the start of the
            step or, while the descent is uncertain, of the sum of these slopes. At very low rates
            slopes differ in sign by chance, but are small.
        real: The descent is certain if C is below this share of the sum of the initial slopes, and
            the number of negative slopes exceeds that of positive ones by 2√n. Then the sweep ends
            once all descent is undone at a rate far above the best one.
        most: A descent of more than this multiple of that sum does not count. On the way down
            slopes become flatter; only those of diverged weights are so much steeper.
        wild: A step has diverged if its final slope is this many times both its initial one and
            all descent so far; the sweep ends before it.
        calm: After the sweep, the memory 1/(1 − β₁) must fit this many times into the run.
        least_memory: Minimum of this memory. Runs of a few hundred steps reach a lower loss with
            a memory of three gradients than of ten (docs/ablations.md), which short-horizon
            hypergradients do not detect. The sweep itself uses the given β₁, because slopes are
            noisier with less momentum.
    """

    positive = ("parts",)

    parts: int = 20
    shortest: int = 8
    longest: int = 100
    fewest: int = 20
    unknown: int = 25
    decades: float = 4.0
    stretch: float = 2.0
    margin: float = 1.5
    interpolation: float = 0.75
    near: float = 4.0
    rise: float = 0.5
    real: float = 0.25
    most: float = 10.0
    wild: float = 100.0
    calm: int = 300
    least_memory: float = 3.0

    def steps(self, total_steps: int | None) -> int:
        """Length of the sweep: 5 % of the run, 8 to 100 steps; 0 in runs of fewer than 20 steps.

        Examples:
            >>> settings = SweepSettings()
            >>> settings.steps(None), settings.steps(19), settings.steps(20), settings.steps(1000)
            (25, 0, 8, 50)
        """
        if total_steps is None:
            return self.unknown
        if total_steps < self.fewest:
            return 0
        return max(self.shortest, min(self.longest, total_steps // self.parts))

    def calmed(self, beta1: float, total_steps: int | None) -> float:
        """Change of the raw value of β₁ after a sweep; 0 if its memory is short enough.

        Args:
            beta1: Value of β₁.
            total_steps: Steps in the run; if None, β₁ does not change.

        Examples:
            >>> settings = SweepSettings()
            >>> round(settings.calmed(0.9, 1500), 3), settings.calmed(0.9, 6000)
            (-0.693, 0.0)
        """
        if total_steps is None:
            return 0.0
        memory = max(self.least_memory, total_steps / self.calm)
        return min(0.0, math.log((1 - beta1) * memory))


@dataclass(kw_only=True)
class LRSweep(Saved):
    """The state of a sweep: plain numbers, saved with the run.

    Args:
        steps: Number of steps over the range; the sweep ends earlier once the rate is clearly too
            high, and later if the loss still falls at its end.
        settings: Settings of the sweep.
    """

    steps: int
    settings: SweepSettings = SweepSettings()

    taken: int = 0
    measured: int = 0
    change: float = 0.0
    lowest: float = 0.0
    best: float = math.nan
    zero: float = 1.0
    gain: float = 1.0
    last_gain: float = 1.0
    balance: int = 0
    seen: bool = False
    uphill: int = 0
    ended: bool = False
    blown: float = 0.0
    lowered: float = 0.0
    steepest: float = 0.0
    hoped: float = 0.0
    real: bool = False
    alarmed: bool = False
    missed: int = 0
    proven: bool = True

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"probe={self.steps} must be at least 2 steps, or False for none")

    def factor(self, step: int) -> float:
        """Factor of the given rate at a step of the sweep."""
        return 10.0 ** (self.settings.decades * (2 * step / (self.steps - 1) - 1) - self.lowered)

    def observe(self, slope: float, start: float = 0.0, gain: float = 1.0) -> bool:
        """Record the slope at the end of the last step; true if C is the lowest so far.

        At very low rates slopes on different batches may differ in sign by chance, so the sweep
        ends only after a descent: three more negative slopes than positive ones. On a plateau that
        large steps do not leave, the sum fluctuates by chance, so a further descent counts only at
        a rate close to the best one so far, or if the total doubles. A step whose final slope
        is many times both its initial slope and all descent so far has diverged, whatever its sign.

        Args:
            slope: g · Δw at the end of the step; 0, as at its start, if the step was too short to
                be measured.
            start: The same at its start; 0 if unknown.
            gain: Factor of the step because running means start at 0
                (:meth:`selftune.rules.AbstractRule.initial_gain`).
        """
        self.missed, self.last_gain = 0, gain
        # Slopes are proportional to the rate until a step diverges; `steepest` is their ratio.
        rate, wild = self.factor(self.taken - 1), self.settings.wild
        self.steepest = max(self.steepest, abs(start) / rate)
        scale = max(rate * self.steepest, -self.lowest)
        self.measured += slope != 0 or start != 0
        steep = abs(slope) > (wild if self.measured > FIRST else wild**2) * scale > 0
        if self.alarmed or steep or not math.isfinite(slope):
            self._blow_up()
            return False
        self.change += slope
        self.hoped += abs(start)
        self.balance += (slope < 0) - (slope > 0)
        self.seen = self.seen or self.balance >= 3
        following = 1.01 * self.best * self.factor(1) / self.factor(0)
        near = max(self.settings.near * self.best, following)
        lost = self.real and rate > near and self.change > 0
        rising = lost or self.change > self.settings.rise * (
            abs(start) if self.real else self.hoped
        )
        self.uphill = self.uphill + 1 if self.seen and rising else 0
        most = self.steps * self.settings.stretch
        further = self.real and rate <= near and self.taken < most
        if self.uphill >= 2 or (self.taken >= self.steps and not further):
            self.ended = True
            self.blown = self.factor(self.taken - 1) if self.uphill >= 2 else 0.0
        plausible = -self.change <= self.settings.most * self.hoped or not self.hoped
        often = self.balance >= self._certain
        promised = -self.change > self.settings.real * self.hoped
        real, slight = often and promised, self.real and often and not promised
        counts = rate <= near or (self.change < 2 * self.lowest and not slight)
        if self.change < self.lowest and counts and plausible:
            self.lowest, self.best, self.real, self.proven = self.change, rate, real, False
            self.gain, self.zero = gain, 1.0
            return True
        if start < 0 < slope and rate <= following:  # in multiples of the best step
            longer = rate * gain / (self.best * self.gain)
            self.zero = max(1.0, longer * start / (start - slope))
        return False

    def miss(self) -> bool:
        """Record a gradient that is not finite; return whether to skip its step.

        The batch may be the cause, so the next one decides whether the last step has diverged.
        Without a last step, the learning rate cannot be the cause; after as many as the sweep has
        steps, it ends without a choice.
        """
        self.missed += 1
        if self.missed > self.steps:
            self.leave()
        return self.missed == 1 or self.taken == 0

    def _blow_up(self) -> None:
        """End the sweep, or restart it at lower rates if even the first ones are too high."""
        self.ended = self.taken > FIRST or self.lowered > 0
        self.blown = self.factor(self.taken - 1)
        if not self.ended:
            self.lowered = 2 * self.settings.decades
            self.taken = self.measured = 0
            self.change, self.lowest, self.best, self.zero = 0.0, 0.0, math.nan, 1.0
            self.balance, self.seen, self.uphill, self.steepest = 0, False, 0, 0.0
            self.alarmed, self.real, self.hoped = False, False, 0.0

    def leave(self) -> None:
        """End the sweep without a choice."""
        self.ended = self.proven = True
        self.best, self.blown, self.lowest = math.nan, 0.0, 0.0

    @property
    def choice(self) -> float:
        """Factor of the given rate.

        If no step descended: 1, or a tenth of the factor at which the run diverged or, if the loss
        rose all along or nearly all slopes were positive, of the first one; at most 1.
        """
        if math.isnan(self.best):
            uphill = self.balance < -self._certain or (
                self.change > self.settings.rise * self.hoped > 0
            )
            blown = self.factor(0) if uphill else self.blown
            return min(1.0, blown / 10) if blown else 1.0
        # The next step must not be longer than the best one, and late ones shorter by the margin.
        least = self.last_gain if self.last_gain > 1 else 0.0
        margin = self.settings.margin
        higher = max(1.0, self.zero / margin**2) ** self.settings.interpolation
        return self.best * higher * self.gain / max(margin, least)

    @property
    def _certain(self) -> float:
        """Excess of slopes of one sign that is not chance: two standard errors."""
        return 2 * math.sqrt(self.measured)
