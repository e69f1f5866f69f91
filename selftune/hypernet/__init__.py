"""Best-response hypernetworks for custom loops: hyperparameters as inputs of the network."""

from selftune.hypernet._places import Report
from selftune.hypernet.conversion import SelfTuned, convert
from selftune.hypernet.linearized import delta_backward

__all__ = ["Report", "SelfTuned", "convert", "delta_backward"]
