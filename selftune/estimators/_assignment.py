"""The assignment of hyperparameters to estimators."""

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
        rows: Estimator with a row for each hyperparameter of the update not assigned to ``whole``.
        whole: The whole-step estimator, or None.
        names: The hyperparameters assigned to ``whole``.
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
    """Assign hyperparameters to a given estimator, and the others to a default one.

    Args:
        given: The user's estimator; None: ``Trace``.
        update: The weight step.
        names: The tuned hyperparameters.
        layers: Hyperparameters inside the model or the loss, which elementwise estimators do
            not support.
        stride: Steps between two tracked steps, for a default estimator.
        answers_all: Whether a given whole-step estimator gets all hyperparameters.
        splits: Whether outputs and their loss can be computed separately.

    Raises:
        TypeError: ``given`` is not an estimator.
        ValueError: An estimator does not support a hyperparameter assigned to it.
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
            "curvature='gauss-newton' needs the model's output and a loss of it (loss_fn=): use "
            "'exact' if the model or objective= returns the loss itself"
        )
    whole.check(update, answers, endless=True)
    return Assignment(rows, whole, answers)
