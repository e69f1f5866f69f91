"""Discrete hyperparameters of one run: units and layers that gates close, and the batch size."""

from selftune.structure.batches import Batches
from selftune.structure.gates import (
    AbstractGated,
    Gate,
    Optional,
    gated,
    open_gates,
    parameter_groups,
)
from selftune.structure.goal import Goal
from selftune.structure.noise_scale import NoiseScale
from selftune.structure.pruning import prune

__all__ = [
    "AbstractGated",
    "Batches",
    "Gate",
    "Goal",
    "NoiseScale",
    "Optional",
    "gated",
    "open_gates",
    "parameter_groups",
    "prune",
]
