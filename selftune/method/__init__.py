"""The method: functions of an explicit state, which both drivers call."""

from collections.abc import Mapping

import torch

from selftune._arguments import COUNT, NAMES, NONE, PAIR, Instance, Kind, Number, OneOf, That
from selftune.method import choice
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
from selftune.method.snapshots import SNAPSHOTS
from selftune.method.step import Method, Outer, State, propose
from selftune.method.weight_decay_floor import WeightDecayFloor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ARGUMENTS: dict[str, Kind] = {
    "tune": NONE | NAMES,
    "bounds": NONE
    | That(
        lambda b: isinstance(b, Mapping) and all(map(PAIR.fits, b.values())),
        "(lowest, highest) values by name, such as {'lr': (1e-5, 0.1)}",
    ),
    "average": NONE | Instance((Average,), "an st.Average"),
    "every": NONE | COUNT,
    "settings": NONE | Instance((MethodSettings,), "an st.method.MethodSettings"),
    "snapshots": NONE | OneOf(SNAPSHOTS),
    "tangents": NONE | Number(above=0, most=1) | OneOf(FLOATS),
}
"""Valid values of the common arguments of both drivers."""

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
