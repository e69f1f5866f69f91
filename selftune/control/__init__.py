"""Decisions of a run as plain numbers: the sweep of the learning rate, the guard, the end."""

from selftune.control.controller import (
    Action,
    Activity,
    Controller,
    Gradient,
    Hypergradient,
    Record,
    SweepSlope,
    TrainingLoss,
    TrialSlopes,
    ValidationLoss,
    make_guard,
    make_sweep,
)
from selftune.control.final_weights import FinalWeights
from selftune.control.guard import Guard, GuardPolicy
from selftune.control.lr_sweep import LRSweep, SweepSettings

__all__ = [
    "Action",
    "Activity",
    "Controller",
    "FinalWeights",
    "Gradient",
    "Guard",
    "GuardPolicy",
    "Hypergradient",
    "LRSweep",
    "Record",
    "SweepSettings",
    "SweepSlope",
    "TrainingLoss",
    "TrialSlopes",
    "ValidationLoss",
    "make_guard",
    "make_sweep",
]
