"""Self-tuned optimizers with torch's interface."""

from selftune.optim._base import SelfTuningOptimizer
from selftune.optim._options import TuningOptions
from selftune.optim.mixture import Mixture
from selftune.optim.muon import Muon
from selftune.optim.shells import SGD, Adam, AdamW, Lion, RMSprop
from selftune.optim.wrapper import SelfTuning

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Lion",
    "Mixture",
    "Muon",
    "RMSprop",
    "SelfTuning",
    "SelfTuningOptimizer",
    "TuningOptions",
]
