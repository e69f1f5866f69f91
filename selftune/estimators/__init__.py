"""Hypergradient estimators: the sensitivities of the weights to the hyperparameters."""

from typing import Any

from selftune.estimators._assignment import Assignment, assign
from selftune.estimators._base import AbstractEstimator, Estimate, hypergradient
from selftune.estimators._directions import Tangent
from selftune.estimators._rows import AbstractRows
from selftune.estimators._structured import Structured
from selftune.estimators.best_response import BestResponse, Response
from selftune.estimators.exact import Exact, FiniteDifference
from selftune.estimators.forward import Forward, ForwardMemory
from selftune.estimators.implicit import Implicit, ImplicitMemory
from selftune.estimators.one_step import OneStep
from selftune.estimators.trace import Trace
from selftune.estimators.unrolled import Passed, Unrolled
from selftune.problem import Point
from selftune.update import Clock

MEMORIES: list[Any] = [
    Clock, ForwardMemory, ImplicitMemory, Passed, Point, Response, Structured, Tangent,
]  # fmt: skip
"""Types of estimators' memories, besides tensors, that a saved run may contain."""

__all__ = [
    "MEMORIES",
    "AbstractEstimator",
    "AbstractRows",
    "Assignment",
    "BestResponse",
    "Estimate",
    "Exact",
    "FiniteDifference",
    "Forward",
    "Implicit",
    "OneStep",
    "Trace",
    "Unrolled",
    "assign",
    "hypergradient",
]
