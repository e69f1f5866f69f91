"""Hypergradient estimators: how the weights respond to each hyperparameter."""

from selftune.estimators._base import AbstractEstimator
from selftune.estimators.one_step import OneStep
from selftune.estimators.trace import Trace

__all__ = ["AbstractEstimator", "OneStep", "Trace"]
