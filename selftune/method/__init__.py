"""The method: pure functions of an explicit state, which both drivers call."""

from selftune.method.averaging import Average
from selftune.method.displacement import Displacement
from selftune.method.hyper_optimizer import Frame, HyperOptimizer, HyperState
from selftune.method.sensitivities import Moment, Part, Sensitivities
from selftune.method.settings import (
    DisplacementLimit,
    FloorSettings,
    HyperSettings,
    MethodSettings,
    StiffSettings,
)
from selftune.method.step import Method, Outer, State, propose
from selftune.method.weight_decay_floor import WeightDecayFloor

__all__ = [
    "Average",
    "Displacement",
    "DisplacementLimit",
    "FloorSettings",
    "Frame",
    "HyperOptimizer",
    "HyperSettings",
    "HyperState",
    "Method",
    "MethodSettings",
    "Moment",
    "Outer",
    "Part",
    "Sensitivities",
    "State",
    "StiffSettings",
    "WeightDecayFloor",
    "propose",
]
