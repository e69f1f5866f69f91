"""Decisions during a run: learning-rate sweep, guard and final weights."""

from selftune._arguments import FLAG, NONE, Instance, Kind, OneOf, That, Whole
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

ARGUMENTS: dict[str, Kind] = {
    "probe": FLAG | Whole(least=2, most=10_000) | OneOf((0,))
    | Instance((SweepSettings,), "an st.control.SweepSettings"),
    "guard": NONE | FLAG | That(
        lambda g: not isinstance(g, type) and hasattr(g, "begin"),
        "a policy, such as st.control.GuardPolicy(patience=5)",
    ),
}  # fmt: skip
"""Valid values of the common arguments of both drivers."""

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
