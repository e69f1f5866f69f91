"""Discrete hyperparameters tuned in one run: units, layers and the batch size."""

from selftune.structure.batches import Batches, step_overhead
from selftune.structure.choice import Choice, Chooser
from selftune.structure.gates import (
    AbstractGated,
    Gate,
    Optional,
    gated,
    open_gates,
    parameter_groups,
)
from selftune.structure.goal import Goal
from selftune.structure.insertion import with_gates
from selftune.structure.noise_scale import NoiseScale
from selftune.structure.pruning import prune
from selftune.structure.recurrent import Recurrent, RecurrentLayers
from selftune.structure.transformer import Attention, Encoder, EncoderLayer

__all__ = [
    "AbstractGated",
    "Attention",
    "Batches",
    "Choice",
    "Chooser",
    "Encoder",
    "EncoderLayer",
    "Gate",
    "Goal",
    "NoiseScale",
    "Optional",
    "Recurrent",
    "RecurrentLayers",
    "gated",
    "open_gates",
    "parameter_groups",
    "prune",
    "step_overhead",
    "with_gates",
]
