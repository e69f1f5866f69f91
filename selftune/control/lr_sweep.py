"""The learning-rate sweep at the start (a range test).

Over the first few steps the rate climbs by equal ratios through eight decades around the given
one. After each step the next gradient gives the slope of the loss at the end of that step,
``s = g₊ · Δw``, on a batch the step has not seen. While the slope is downhill a longer step
would have been better; where it turns uphill the rate has gone too far. The sum of the slopes,
``C = Σ s``, estimates the change of the loss (a Riemann sum along the path), so the rate at
which C is lowest is the largest that still descends. It needs no loss and no extra pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from selftune._arguments import Settings
from selftune.hparams import Hparam

FIRST = 3
"""Steps of a sweep in which only its lowest rates are tried."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """How the learning rate is swept.

    Attributes:
        parts: A sweep takes this part of the run …
        shortest: … with so many steps at least …
        longest: … and at most.
        fewest: Steps in a run below which there is no sweep.
        unknown: Length of the sweep in a run of unknown length.
        decades: Reach of the sweep on either side of the given rate.
        margin: The chosen rate is the largest descending one divided by this.
        near: How far above the best rate so far, or else at the next one, any descent counts;
            farther above it must be twice as deep.
        rise: C that counts as uphill, in slopes at the start of the step: at rates too small to
            matter, slopes of other batches differ in sign by chance, and are small beside that.
        wild: A step whose end is so many times as steep as its start, or as all descent so far, has
            blown up: the sweep ends before it.
        calm: How many times the memory 1/(1 − β₁) must fit into a run that begins …
        least_memory: … but for so few gradients: runs of some hundred steps end lower with three
            than with the usual ten (docs/ablations.md), which hypergradients are too short-sighted
            to see. The sweep itself takes the given β₁: with less momentum its slopes are noisier.
    """

    parts: int = 20
    shortest: int = 8
    longest: int = 100
    fewest: int = 20
    unknown: int = 25
    decades: float = 4.0
    margin: float = 1.5
    near: float = 4.0
    rise: float = 0.5
    wild: float = 100.0
    calm: int = 300
    least_memory: float = 3.0

    def steps(self, total_steps: int | None) -> int:
        """Length of the sweep in a run: 5 % of it, 8 to 100 steps; none in a run under 20.

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
        """How far the raw value of β₁ is moved after a sweep; 0 if its memory is short enough.

        Args:
            beta1: Its value.
            total_steps: Steps in the run; where they are not known it stays.

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
class LRSweep:
    """The state of a sweep: plain numbers, saved with the run.

    Args:
        steps: Length of the sweep at most; it ends once the rate is plainly too high.
        settings: How it is swept.
    """

    steps: int
    settings: SweepSettings = SweepSettings()

    taken: int = 0
    change: float = 0.0
    lowest: float = 0.0
    best: float = math.nan
    balance: int = 0
    seen: bool = False
    uphill: int = 0
    ended: bool = False
    blown: float = 0.0
    lowered: float = 0.0
    steepest: float = 0.0
    hoped: float = 0.0
    alarmed: bool = False
    proven: bool = True

    def __post_init__(self) -> None:
        """Check the length."""
        if self.steps < 2:
            raise ValueError(f"probe={self.steps} must be at least 2 steps, or False for none")

    def factor(self, step: int) -> float:
        """The factor of the given rate at a step of the sweep."""
        return 10.0 ** (self.settings.decades * (2 * step / (self.steps - 1) - 1) - self.lowered)

    def observe(self, slope: float, start: float = 0.0) -> bool:
        """Take in the slope at the end of the last step; true where C is the lowest so far.

        At rates too small to matter two batches' slopes may differ in sign by chance, so the
        sweep ends only after descent has been seen: three more downhill steps than uphill.
        And where the loss has reached a plateau that large steps do not leave, the sum wanders
        by chance. Further descent counts if it comes at a rate not far above the best so far, or if
        it is as much again. A slope that is many times as steep as that at the start of the step,
        or as all descent before, is of a step that went anywhere, downhill or not.

        Args:
            slope: g · Δw at the end of the step.
            start: The same at its start; 0 where it is not known.
        """
        # Slopes of steps are in proportion to the rate until one blows up; a few tell how steep.
        rate, wild = self.factor(self.taken - 1), self.settings.wild
        self.steepest = max(self.steepest, abs(start) / rate)
        scale = max(rate * self.steepest, -self.lowest)
        steep = abs(slope) > (wild if self.taken > FIRST else wild**2) * scale > 0
        if self.alarmed or steep or not math.isfinite(slope):
            self._blow_up()
            return False
        self.change += slope
        self.hoped += abs(start)
        self.balance += 1 if slope < 0 else -1
        self.seen = self.seen or self.balance >= 3
        rising = self.change > self.settings.rise * abs(start)
        self.uphill = self.uphill + 1 if self.seen and rising else 0
        if self.uphill >= 2 or self.taken >= self.steps:
            self.ended = True
            self.blown = self.factor(self.taken - 1) if self.uphill >= 2 else 0.0
        near = max(self.settings.near, 1.01 * self.factor(1) / self.factor(0)) * self.best
        if self.change < self.lowest * (2.0 if rate > near else 1.0):
            self.lowest, self.best = self.change, rate
            self.proven = False
            return True
        return False

    def _blow_up(self) -> None:
        """End the sweep, or begin it anew at lower rates where even the first ones are too high."""
        self.ended = self.taken > FIRST or self.lowered > 0
        self.blown = self.factor(self.taken - 1)
        if not self.ended:
            self.lowered = 2 * self.settings.decades
            self.taken, self.change, self.lowest, self.best = 0, 0.0, 0.0, math.nan
            self.balance, self.seen, self.uphill, self.steepest = 0, False, 0, 0.0
            self.alarmed, self.hoped = False, 0.0

    def leave(self) -> None:
        """End the sweep without a choice."""
        self.ended = self.proven = True
        self.best, self.blown, self.lowest = math.nan, 0.0, 0.0

    @property
    def choice(self) -> float:
        """The factor for the given rate.

        If nothing descended, 1, which keeps it, or a tenth of what blew the run up.
        """
        if math.isnan(self.best):
            uphill = self.change > self.settings.rise * self.hoped > 0  # all along
            blown = self.factor(0) if uphill else self.blown
            return min(1.0, blown / 10) if blown else 1.0
        return self.best / self.settings.margin

    def moves(
        self, values: Mapping[str, float], hparams: Mapping[str, Hparam], total_steps: int | None
    ) -> dict[str, float]:
        """By how much raw values change at the end, by name.

        Args:
            values: Present values of the tuned hyperparameters.
            hparams: Their definitions.
            total_steps: Steps in the run, or None.
        """
        averaging = [n for n, h in hparams.items() if h.role == "momentum" and not h.accumulates]
        calmed = {n: self.settings.calmed(values[n], total_steps) for n in averaging}
        return {"lr": math.log(self.choice)} | calmed

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return {n: v for n, v in asdict(self).items() if n != "settings"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value)
