"""The method: pure functions of an explicit state, which both drivers call."""

from selftune.method.averaging import Average
from selftune.method.displacement import Displacement, DisplacementLimit
from selftune.method.hyper_optimizer import Frame, HyperOptimizer, HyperSettings, HyperState
from selftune.method.sensitivities import Moment, Part, Sensitivities
from selftune.method.settings import MethodSettings
from selftune.method.step import Method, Outer, State, propose
from selftune.method.stiff_directions import StiffSettings
from selftune.method.weight_decay_floor import FloorSettings, WeightDecayFloor

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
