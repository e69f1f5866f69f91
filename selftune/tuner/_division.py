"""Which estimator follows which hyperparameter of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from selftune.estimators import AbstractEstimator, AbstractRows, BestResponse, OneStep, Trace
from selftune.update import Update


class Division(NamedTuple):
    """The estimators of a run.

    Attributes:
        rows: Keeps a response for each hyperparameter of the update.
        whole: Follows whole steps, or None.
        followed: The names that ``whole`` answers for; ``rows`` does for all others.
    """

    rows: AbstractRows
    whole: AbstractEstimator | None
    followed: list[str]


def divide(
    given: AbstractEstimator,
    update: Update,
    names: Sequence[str],
    strengths: Collection[str],
    every: int,
    *,
    parts: bool,
) -> Division:
    """What a given estimator answers for, and what it is joined by for the rest.

    Args:
        given: The user's estimator.
        update: The weight step.
        names: The tuned hyperparameters.
        strengths: Names that act inside the model or the loss, which no row can follow.
        every: Weight steps from one hyperparameter step to the next.
        parts: Whether outputs and their loss are apart.

    Raises:
        TypeError: No estimator.
        ValueError: A hyperparameter that its estimator cannot follow.
    """
    if not isinstance(given, AbstractEstimator):
        raise TypeError(f"estimator={given!r} must be an estimator, such as st.Trace()")
    inside = [n for n in names if n in strengths]
    whole: AbstractEstimator | None
    if isinstance(given, AbstractRows):
        rows, whole, followed = given, BestResponse() if inside else None, inside
    elif isinstance(given, BestResponse) and not given.update:
        rows, whole, followed = Trace(stride=every), given, inside
    else:
        rows, whole, followed = OneStep(stride=every), given, list(names)
    if isinstance(whole, BestResponse) and not parts:
        whole.check_whole()
    rows.check(update, [n for n in names if n not in followed], endless=True)
    if not followed or whole is None:
        return Division(rows, None, [])
    whole.check(update, followed, endless=True)
    return Division(rows, whole, followed)
