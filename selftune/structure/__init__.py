"""The structure of a network as hyperparameters: units and layers that gates close."""

from selftune.structure.gates import (
    AbstractGated,
    Gate,
    Optional,
    gated,
    open_gates,
    parameter_groups,
)
from selftune.structure.pruning import prune

__all__ = [
    "AbstractGated",
    "Gate",
    "Optional",
    "gated",
    "open_gates",
    "parameter_groups",
    "prune",
]
