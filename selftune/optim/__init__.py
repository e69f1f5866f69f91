"""Self-tuned optimizers with torch's interface."""

from selftune.optim._base import SelfTuned
from selftune.optim.shells import SGD, Adam, AdamW, Lion, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "Lion", "RMSprop", "SelfTuned"]
