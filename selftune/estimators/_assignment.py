"""Which estimator answers for which hyperparameter of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from selftune.estimators._base import AbstractEstimator
from selftune.estimators._rows import AbstractRows
from selftune.estimators.best_response import BestResponse
from selftune.estimators.one_step import OneStep
from selftune.estimators.trace import Trace
from selftune.update import Update


class Assignment(NamedTuple):
    """The estimators of a run.

    Attributes:
        rows: Keeps a row for each hyperparameter of the update that ``whole`` does not answer for.
        whole: Sees whole steps; or None.
        names: The hyperparameters that ``whole`` answers for.
    """

    rows: AbstractRows
    whole: AbstractEstimator | None
    names: list[str]


def assign(
    given: AbstractEstimator | None,
    update: Update,
    names: Sequence[str],
    layers: Collection[str] = (),
    *,
    stride: int,
    answers_all: bool = False,
    splits: bool = False,
) -> Assignment:
    """The hyperparameters a given estimator answers for, and the estimator of the others.

    Args:
        given: The user's estimator; None: ``Trace``.
        update: The weight step.
        names: The tuned hyperparameters.
        layers: Names that act inside the model or the loss, of which no row can keep track.
        stride: Of a default: it tracks one step of so many.
        answers_all: Whether a given estimator of whole steps answers for everything.
        splits: Whether outputs and their loss can be had apart.

    Raises:
        TypeError: No estimator.
        ValueError: A hyperparameter that its estimator cannot answer for.
    """
    given = Trace(stride=stride) if given is None else given
    if not isinstance(given, AbstractEstimator):
        raise TypeError(f"estimator={given!r} must be an estimator, such as st.Trace()")
    inside = [n for n in names if n in layers]
    whole: AbstractEstimator | None
    rows: AbstractRows
    if isinstance(given, AbstractRows):
        rows, whole, answers = given, BestResponse() if inside else None, inside
    elif given.answers_for_update or answers_all:
        rows, whole, answers = OneStep(stride=stride), given, list(names)
    else:
        rows, whole, answers = Trace(stride=stride), given, inside
    rows.check(update, [n for n in names if n not in answers], endless=True)
    if whole is None or not (answers or answers_all):
        return Assignment(rows, None, [])
    if whole.needs_outputs and not splits:
        raise ValueError(
            "curvature='gauss-newton' needs the model's output and a loss of it, loss_fn=: use "
            "'exact' where the model or objective= returns the loss itself"
        )
    whole.check(update, answers, endless=True)
    return Assignment(rows, whole, answers)
