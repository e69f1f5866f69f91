"""The decision whether to compile a run: the time saved against the compile time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from selftune.tuner._compiled import Fused
from selftune.tuner._group import Group
from selftune.tuner._plan import Plan

log = logging.getLogger("selftune")

WATCHED = 20
"""Number of eager steps timed before the decision."""
FUSED, LAUNCHED = 0.4, 4e-4
"""Time saved by compiling a step: a fraction, or seconds per parameter tensor if more."""
LONG = 2.0
"""Minimum duration of the rest of the run, relative to the compile time."""
COMPILED = 20.0, 4.0
"""Compile time in seconds: minimum, and per parameter tensor (measured on a CPU)."""


def payoff(
    begun: Sequence[float], ended: Sequence[float], left: int, tensors: int
) -> tuple[bool, float]:
    """Whether compiling pays off, and about how many seconds it saves.

    Wall time includes other processes on a busy machine, and process time sums over threads; the
    shorter of the two is the better estimate.

    Args:
        begun: Wall and process time before ``WATCHED`` eager steps.
        ended: The same after them.
        left: Remaining steps of the run.
        tensors: Number of parameter tensors.
    """
    taken = min(end - start for start, end in zip(begun, ended, strict=True)) / WATCHED
    gain = min(max(FUSED * taken, LAUNCHED * tensors), 0.9 * taken)
    saved, cost = gain * left, COMPILED[0] + COMPILED[1] * tensors
    return saved > cost and taken * left > LONG * cost, saved


@dataclass
class Compiling:
    """Compiles a run on request, or if its first eager steps show that it pays."""

    plan: Plan
    fused: Fused
    group: Group
    save: Callable[[], None]
    _clock: list[tuple[float, float]] = field(default_factory=list)

    def decide(self, step: int, tensors: int) -> None:
        """Decide whether to compile from this step on."""
        if self.plan.compile is False or self.fused.compiled or self.group.sharded:
            return
        if self.plan.compile is True:
            self.plan.compile = False  # decided: a failure is not repeated at every step
            self.fused.compile()
            return
        self._clock.append((time.perf_counter(), time.process_time()))
        if len(self._clock) <= WATCHED:
            return
        pays, saved = payoff(self._clock[0], self._clock[-1], self.plan.total - step, tensors)
        pays = self.group.from_first(lambda: pays)
        if pays and self.group.together:
            self.save()  # torchrun kills ranks still compiling 30 s after Ctrl-C
        self.plan.compile = False
        if pays:
            self.fused.compile()
        else:
            log.info("not compiled: it would save about %.0f s", saved)
