"""Arguments that both drivers have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from selftune._arguments import COUNT, NAMES, NONE, PAIR, Instance, Kind, Number, OneOf, That
from selftune.method.averaging import Average
from selftune.method.settings import MethodSettings
from selftune.method.snapshots import SNAPSHOTS

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
