"""The arguments of a tuner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from selftune.control import SweepSettings
from selftune.estimators import AbstractEstimator, Assignment, assign
from selftune.hparams import Hparam
from selftune.method import Average, MethodSettings
from selftune.nn import Strength
from selftune.tuner._group import Group
from selftune.tuner._objective import Objective
from selftune.tuner._population import Population
from selftune.tuner._scoring import Metric
from selftune.update import Update


@dataclass(kw_only=True)
class Given:
    """The arguments of a :class:`Tuner`, independent of its data, where the others are explained.

    Attributes:
        objective: The model with its training loss.
        update: The rule with penalties and learning-rate decay.
        strengths: Tuned layers and losses by name.
        known: Scales and bounds of all hyperparameters by name.
        values: Their starting values.
        chosen: Names whose starting values were passed by the user.
        names: Names of the tuned hyperparameters.
        warmup: Steps of the linear warm-up.
        population: The population, or None.
        group: The ranks.
    """

    objective: Objective
    update: Update
    strengths: Mapping[str, Strength]
    known: Mapping[str, Hparam]
    values: dict[str, float]
    chosen: set[str]
    names: list[str]
    bounds: Mapping[str, tuple[float, float]] | None
    estimator: AbstractEstimator | None
    tangents: float | torch.dtype | None
    snapshots: str | None
    average: Average
    every: int | None
    hyper_rate: float | None
    schedule: str
    warmup: int
    probe: bool | int | SweepSettings
    guard: Any
    metrics: Mapping[str, Metric]
    amp: bool
    population: Population | None
    settings: MethodSettings
    group: Group

    def assignment(self, total: int | None) -> Assignment:
        """The estimators of a run."""
        return assign(
            self.estimator, self.update, self.names, self.strengths,
            stride=min(self.average.stride, self.settings.hyper.every(total, self.every)),
            splits=self.objective.splits,
        )  # fmt: skip
