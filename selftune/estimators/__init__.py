"""Hypergradient estimators: how the weights respond to each hyperparameter."""

from selftune.estimators._base import AbstractEstimator, Estimate, hypergradient
from selftune.estimators._rows import AbstractRows
from selftune.estimators.exact import Exact, FiniteDifference
from selftune.estimators.forward import Forward
from selftune.estimators.implicit import Implicit
from selftune.estimators.one_step import OneStep
from selftune.estimators.trace import Trace
from selftune.estimators.unrolled import Unrolled

__all__ = [
    "AbstractEstimator",
    "AbstractRows",
    "Estimate",
    "Exact",
    "FiniteDifference",
    "Forward",
    "Implicit",
    "OneStep",
    "Trace",
    "Unrolled",
    "hypergradient",
]
