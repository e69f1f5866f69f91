"""The method: functions of an explicit state, which both drivers call."""

from selftune.method import choice
from selftune.method.arguments import ARGUMENTS
from selftune.method.averaging import Average
from selftune.method.displacement import Displacement
from selftune.method.hyper_optimizer import Frame, HyperOptimizer, HyperState
from selftune.method.live_units import layers, live_units
from selftune.method.sensitivities import Moment, Part, Sensitivities
from selftune.method.settings import (
    DisplacementLimit,
    FloorSettings,
    HyperSettings,
    MethodSettings,
    SliceSettings,
    StiffSettings,
)
from selftune.method.slices import SHARE, Slice
from selftune.method.step import Method, Outer, State, propose
from selftune.method.weight_decay_floor import WeightDecayFloor

__all__ = [
    "ARGUMENTS",
    "SHARE",
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
    "Slice",
    "SliceSettings",
    "State",
    "StiffSettings",
    "WeightDecayFloor",
    "choice",
    "layers",
    "live_units",
    "propose",
]
