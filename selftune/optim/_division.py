"""Which estimator follows what in an optimizer."""

from __future__ import annotations

from typing import NamedTuple

from selftune.estimators import AbstractEstimator, AbstractRows, BestResponse, OneStep, Trace
from selftune.optim._following import Following
from selftune.optim._stepper import Opaque
from selftune.tuning import Tuning
from selftune.update import Update


class Division(NamedTuple):
    """The estimators of an optimizer.

    Attributes:
        rows: Keeps a response for each hyperparameter of the update.
        following: Of whole steps, in place of ``rows``, or None.
    """

    rows: AbstractRows
    following: Following | None


def divide(
    given: AbstractEstimator | None, update: Update, tuning: Tuning, stride: int
) -> Division:
    """What a given estimator answers for.

    Args:
        given: The user's estimator; None: ``Trace``.
        update: The weight step.
        tuning: The tuned hyperparameters.
        stride: Of the default: it observes one step of so many.

    Raises:
        TypeError: No estimator.
        ValueError: A hyperparameter or a rule that the estimator cannot follow.
    """
    if given is None:
        return Division(Trace(stride=stride), None)
    if not isinstance(given, AbstractEstimator):
        raise TypeError(f"estimator={given!r} must be an estimator, such as st.Trace()")
    if isinstance(given, AbstractRows):
        return Division(given, None)
    given.check(update, tuning.names, endless=True)
    if isinstance(given, BestResponse):
        given.check_whole()
    if isinstance(update.rule, Opaque):
        raise ValueError(
            f"estimator={given} needs a rule of the library (SGD, Adam, …): another "
            "optimizer's steps cannot be differentiated; use Trace or OneStep"
        )
    return Division(OneStep(), Following(given, update, tuning))
