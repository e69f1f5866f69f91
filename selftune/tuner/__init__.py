"""The loop that owns model, data, logging and checkpoints."""

from selftune.tuner._plan import Progress
from selftune.tuner._result import TuningResult
from selftune.tuner._tuner import Tuner

__all__ = ["Progress", "Tuner", "TuningResult"]
