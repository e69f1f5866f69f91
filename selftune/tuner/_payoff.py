"""Whether compiling a run saves more than it takes."""

from __future__ import annotations

from collections.abc import Sequence

WATCHED = 20
"""Eager steps that are timed before it is decided whether to compile."""
FUSED, LAUNCHED = 0.4, 4e-4
"""What compiling saves of an eager step: a share, or seconds a parameter tensor if more."""
LONG = 2.0
"""How many times as long as compiling the rest of the run must be, whatever it would save."""
COMPILED = 20.0, 4.0
"""Seconds that compiling takes: at least, and for each parameter tensor (measured on a CPU)."""


def payoff(
    begun: Sequence[float], ended: Sequence[float], left: int, tensors: int
) -> tuple[bool, float]:
    """Whether compiling pays, and about how many seconds it saves.

    On a busy machine wall time is that of others, with several threads process time counts each:
    the shorter one is nearer to what a step takes.

    Args:
        begun: Wall and process time before ``WATCHED`` eager steps.
        ended: The same after them.
        left: Steps that are left in the run.
        tensors: Number of parameter tensors.
    """
    taken = min(end - start for start, end in zip(begun, ended, strict=True)) / WATCHED
    gain = min(max(FUSED * taken, LAUNCHED * tensors), 0.9 * taken)
    saved, cost = gain * left, COMPILED[0] + COMPILED[1] * tensors
    return saved > cost and taken * left > LONG * cost, saved
