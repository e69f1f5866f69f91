"""Hypergradient estimators: how the weights respond to each hyperparameter."""

from selftune.estimators._base import AbstractEstimator
from selftune.estimators.exact import Exact, FiniteDifference
from selftune.estimators.one_step import OneStep
from selftune.estimators.rollout import Rollout
from selftune.estimators.trace import Trace

__all__ = ["AbstractEstimator", "Exact", "FiniteDifference", "OneStep", "Rollout", "Trace"]
