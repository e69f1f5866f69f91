"""The scale of a hyperparameter's chart, and the positions of event marks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from selftune.bijections import Log
from selftune.hparams import Hparam

LOG10 = "log10"
"""First part of the tag of the decimal logarithm of a rate: ``log10/lr``."""
WHEN = "when"
"""First part of the tag of the points that mark events: ``when/lr``."""
RATES = ("rate", "decay", "regularizer")


def logarithmic(hparam: Hparam) -> bool:
    """Whether charts show the decimal logarithm of a hyperparameter, as for rates.

    Examples:
        >>> from selftune.hparams import LR, MOMENTUM
        >>> logarithmic(LR), logarithmic(MOMENTUM)
        (True, False)
    """
    return hparam.role in RATES and isinstance(hparam.bijection, Log)


def drawn(hparam: Hparam, value: float) -> float:
    """The height of a value in charts; log 0 is -inf, and not drawn."""
    if not logarithmic(hparam):
        return value
    return math.log10(value) if value > 0 else -math.inf


def middle(values: float | Sequence[float]) -> float:
    """The value that represents groups or layers that differ: the upper median."""
    if not isinstance(values, Sequence):
        return float(values)
    tuned = sorted(v for v in values if v) or [0.0]  # values of 0 among others are not tuned
    return tuned[len(tuned) // 2]


def marks(
    hparams: Mapping[str, Hparam], values: Mapping[str, float | Sequence[float]]
) -> Iterator[tuple[str, float]]:
    """Rows that mark an event in the charts of the hyperparameters that it set.

    Args:
        hparams: The tuned hyperparameters.
        values: Values after the event, of the hyperparameters that it set.

    Examples:
        >>> from selftune.hparams import LR
        >>> list(marks({"lr": LR}, {"lr": 0.01}))
        [('when/lr', -2.0)]
    """
    for name in hparams:
        height = drawn(hparams[name], middle(values[name])) if name in values else -math.inf
        if math.isfinite(height):
            yield f"{WHEN}/{name}", height
