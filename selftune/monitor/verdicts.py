"""Verdicts on hyperparameters: a word, a number and a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from selftune.hparams import DECAY, LR, MOMENTUM

KINDS = ("settled", "moving", "noise", "at bound")
"""The number of a verdict is its index here."""
RECENT = 0.2
"""Fraction of a run's hyperparameter steps that are judged, at least ``LEAST`` steps."""
LEAST = 6
MOVED = 0.1
"""Minimum change in raw space that counts as movement."""
CLEAR = 0.46
"""Signal-to-noise ratio below which hypergradients count as noise."""
LATE = 1 / 3
"""Last share of the run; a change by more than ``FAR`` in it is part of the verdict."""
FAR, LOOSE = 0.4, 0.25
"""Limits of changes in raw space in the last third, and among recent values."""
REWIND = 1.0
"""Decrease of a rate in raw space, between two steps, that only rewinds cause."""
LONGER = "start the next run from there, or train longer"
NEAR = 0.02
"""Largest distance from a bound that counts as at the bound, in raw space."""

AT_BOUND = {
    (LR.role, "lower"): "tuning favours a lower rate: the network may overfit or diverge",
    (LR.role, "upper"): "tuning favours a higher rate: check whether gradients are nearly zero",
    (MOMENTUM.role, "upper"): "tuning favours a longer averaging window than this run allows",
    (MOMENTUM.role, "lower"): "tuning favours none: batches may be noisy, or the rate too high",
    (DECAY.role, "lower"): "tuning favours a constant rate",
}
UNDERFITS = "it does not help: the network underfits, or validation is like training data"
OVERFITS = "more would help: the network overfits; use more data or a smaller network"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a hyperparameter.

    Attributes:
        name: Name of the hyperparameter.
        kind: ``"settled"``, ``"moving"``, ``"noise"`` or ``"at bound"``.
        sentence: The verdict in words.
        snr: Signal-to-noise ratio of its recent hypergradients, or NaN if unknown.
        floored: Whether a floor set its value.
        raised: Its floor at the first hyperparameter step, or NaN.
    """

    name: str
    kind: str
    sentence: str
    snr: float = math.nan
    floored: bool = False
    raised: float = math.nan

    @property
    def code(self) -> int:
        """The kind as a number, for the log."""
        return KINDS.index(self.kind)


class Ends(NamedTuple):
    """Bounds of a hyperparameter, in raw values.

    Attributes:
        low: Lowest.
        high: Highest.
        floored: Whether the lowest is a floor set by the run, not a bound.
    """

    low: float
    high: float
    floored: bool = False


def judge(
    name: str,
    raw: Sequence[float],
    snr: float,
    ends: Ends,
    value: float,
    slope: float = math.nan,
    role: str = "",
    forward: Callable[[float], float] = math.exp,
) -> Verdict:
    """Judge a hyperparameter by its history.

    Args:
        name: Name of the hyperparameter.
        raw: Its raw values, one for each hyperparameter step.
        snr: Signal-to-noise ratio of its recent hypergradients, or NaN if unknown.
        ends: Its bounds.
        value: Its current value.
        slope: Mean recent hypergradient, whose sign shows whether it pushes against a bound; NaN
            if unknown.
        role: Role of the hyperparameter (:class:`~selftune.hparams.Hparam`).
        forward: The map from raw values to values.

    Examples:
        >>> rising = [0.01 * i for i in range(100)]
        >>> print(judge("lr", rising, 0.9, Ends(-9.0, 9.0), 2.7).sentence)
        lr rose at the end, from 2.23 to 2.7: start the next run from there, or train longer
        >>> judge("weight_decay", [-9.2] * 100, 0.3, Ends(-9.2, 2.0), 1e-4).sentence
        'weight_decay is at its lower bound 0.0001: it does not help: the network underfits, or \
validation is like training data'
    """
    recent, late = _tail(raw, RECENT), _tail(raw, LATE)
    if not recent:
        return Verdict(name, "settled", f"{name} stayed at {value:.3g}: no step was taken")
    # It started at a bound, and leaves it or was not moved.
    inward = {"lower": slope <= 0, "upper": slope >= 0}
    for side, end in zip(("lower", "upper"), ends[:2], strict=True):
        if math.isfinite(end) and abs(recent[-1] - end) <= NEAR and not inward[side]:
            floored = side == "lower" and ends.floored
            sentence = _at_floor(name, value) if floored else _at_bound(name, side, value, role)
            return Verdict(name, "at bound", sentence, floored=floored)

    def went(course: Sequence[float]) -> str:
        way = "rose" if course[-1] > course[0] else "fell"
        change = f"{name} {way} at the end, from {forward(course[0]):.3g} to {value:.3g}"
        rewound = role == LR.role and min(b - a for a, b in pairwise(course)) < -REWIND
        return f"{change}, with a rewind" if rewound else f"{change}: {LONGER}"

    drift, change = recent[-1] - recent[0], late[-1] - late[0]
    spread = max(recent) - min(recent)
    steps = [b - a for a, b in pairwise(recent)]
    wander = math.sqrt(sum(s * s for s in steps))  # expected drift of random steps of these sizes
    if abs(drift) > max(MOVED, 2 * wander) or (abs(drift) > MOVED and snr > 2 * CLEAR):
        return Verdict(name, "moving", went(recent))
    noisy = snr < CLEAR and spread > MOVED
    if spread > LOOSE and abs(change) > FAR and not noisy:
        return Verdict(name, "moving", went(late))
    if spread > LOOSE or noisy:
        sentence = f"{name} fluctuates around {value:.3g}: its hypergradients are mostly noise"
        return Verdict(name, "noise", sentence + "; use larger validation batches")
    if abs(change) > FAR:
        since = f"{name} went from {forward(late[0]):.3g} to {value:.3g} in the last third"
        return Verdict(name, "settled", f"{since} of the run, then stayed there")
    return Verdict(name, "settled", f"{name} has settled at {value:.3g}")


def in_words(name: str, kind: str, value: float) -> str:
    """A sentence for the kind of a verdict, for runs in progress.

    Examples:
        >>> in_words("lr", "moving", 0.02)
        'lr is moving, now at 0.02'
    """
    words = {
        "settled": "has settled at", "moving": "is moving, now at", "noise": "fluctuates around",
        "at bound": "is at its bound",
    }  # fmt: skip
    return f"{name} {words[kind]} {value:.3g}"


def _tail(raw: Sequence[float], share: float) -> list[float]:
    return list(raw[-max(LEAST, round(share * len(raw))) :])


def _at_floor(name: str, value: float) -> str:
    return (
        f"{name} lies on its floor {value:.3g}, the least value with an effect in a run of this "
        "length at this learning rate: tuning does not raise it"
    )


def _at_bound(name: str, side: str, value: float, role: str) -> str:
    default = {"lower": UNDERFITS, "upper": OVERFITS}[side]
    why = AT_BOUND.get((role, side), default)
    return f"{name} is at its {side} bound {value:.3g}: {why}"
