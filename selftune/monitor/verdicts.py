"""What became of a hyperparameter, in a word, a number and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from selftune.hparams import DECAY, LR, MOMENTUM

KINDS = ("settled", "moving", "noise", "at bound")
"""The scalar of a verdict is its place here."""
RECENT = 0.2
"""The share of a run's hyperparameter steps that is judged, at least ``LEAST`` of them."""
LEAST = 20
MOVED = 0.1
"""In raw (log or odds) space: less is no movement."""
CLEAR = 0.46
"""Signal-to-noise ratio below which steps are held back: twice that of pure noise."""
NEAR = 0.02
"""How near to a bound counts as at it, in raw space."""

AT_BOUND = {
    (LR.role, "lower"): "training wants to stand still: the net may be over-fitted or broken",
    (LR.role, "upper"): "training wants longer steps than allowed: are gradients nearly zero?",
    (MOMENTUM.role, "upper"): "it wants a longer memory than the length of the run allows",
    (MOMENTUM.role, "lower"): "it wants none: batches may be noisy or the rate high",
    (DECAY.role, "lower"): "the rate wants to stay up: train longer",
}
UNDERFITS = "it does not pay: the net underfits, or validation data are like training data"
OVERFITS = "more would pay: the net over-fits; get more data or a smaller net"


@dataclass(frozen=True)
class Verdict:
    """What became of a hyperparameter.

    Attributes:
        name: Of the hyperparameter.
        kind: ``"settled"``, ``"moving"``, ``"noise"`` or ``"at bound"``.
        sentence: What a person would say.
    """

    name: str
    kind: str
    sentence: str

    @property
    def code(self) -> int:
        """The kind as a number, for the log."""
        return KINDS.index(self.kind)


def judge(
    name: str,
    raw: Sequence[float],
    snr: float,
    ends: tuple[float, float],
    value: float,
    slope: float = math.nan,
    role: str = "",
) -> Verdict:
    """Judge a hyperparameter by its course.

    Args:
        name: Of the hyperparameter.
        raw: Its raw values, one a hyperparameter step.
        snr: Signal-to-noise ratio of its recent hypergradients, or NaN if unknown.
        ends: Lowest and highest raw value.
        value: What it is now.
        slope: Mean recent hypergradient, which tells whether it pushes against a bound; NaN if
            unknown.
        role: Of the hyperparameter (:class:`~selftune.hparams.Hparam`).

    Examples:
        >>> judge("lr", [0.01 * i for i in range(100)], 0.9, (-9.0, 9.0), 0.02).kind
        'moving'
        >>> judge("weight_decay", [-9.2] * 100, 0.3, (-9.2, 2.0), 1e-4).sentence
        'weight_decay sits at its lower bound 0.0001: it does not pay: the net underfits, or \
validation data are like training data'
    """
    count = min(len(raw), max(LEAST, round(RECENT * len(raw))))
    recent = list(raw[-count:])
    if not recent:
        return Verdict(name, "settled", f"{name} stayed at {value:.3g}: no step was taken")
    inward = {"lower": slope < 0, "upper": slope > 0}  # it started at a bound, and leaves it
    for side, end in zip(("lower", "upper"), ends, strict=True):
        if math.isfinite(end) and abs(recent[-1] - end) <= NEAR and not inward[side]:
            return Verdict(name, "at bound", _at_bound(name, side, value, role))
    drift = recent[-1] - recent[0]
    steps = [b - a for a, b in pairwise(recent)]
    wander = math.sqrt(sum(s * s for s in steps))  # how far steps at random would have led
    if abs(drift) > max(MOVED, 2 * wander) or (abs(drift) > MOVED and snr > 2 * CLEAR):
        way = "rising" if drift > 0 else "falling"
        return Verdict(name, "moving", f"{name} is still {way}, now {value:.3g}: train longer")
    if snr < CLEAR and max(recent) - min(recent) > MOVED:
        told = f"{name} wanders around {value:.3g}: its hypergradients are mostly noise"
        return Verdict(name, "noise", told + "; larger validation batches would tell more")
    return Verdict(name, "settled", f"{name} has settled at {value:.3g}")


def _at_bound(name: str, side: str, value: float, role: str) -> str:
    default = {"lower": UNDERFITS, "upper": OVERFITS}[side]
    why = AT_BOUND.get((role, side), default)
    return f"{name} sits at its {side} bound {value:.3g}: {why}"
