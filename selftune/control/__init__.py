"""Decisions during a run: learning-rate sweep, guard and final weights."""

from selftune.control.arguments import ARGUMENTS
from selftune.control.controller import Controller, make_guard, make_sweep
from selftune.control.final_weights import FinalWeights
from selftune.control.good_weights import GoodWeights
from selftune.control.guard import Guard, GuardPolicy
from selftune.control.live_units import LiveUnits
from selftune.control.loss_spike import LossSpike
from selftune.control.lr_sweep import LRSweep, SweepSettings
from selftune.control.records import (
    Action,
    Activity,
    Gradient,
    Hypergradient,
    Record,
    SweepSlope,
    TrainingLoss,
    ValidationLoss,
)
from selftune.control.training_losses import TrainingLosses

__all__ = [
    "ARGUMENTS",
    "Action",
    "Activity",
    "Controller",
    "FinalWeights",
    "GoodWeights",
    "Gradient",
    "Guard",
    "GuardPolicy",
    "Hypergradient",
    "LRSweep",
    "LiveUnits",
    "LossSpike",
    "Record",
    "SweepSettings",
    "SweepSlope",
    "TrainingLoss",
    "TrainingLosses",
    "ValidationLoss",
    "make_guard",
    "make_sweep",
]
