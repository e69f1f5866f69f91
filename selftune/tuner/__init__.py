"""The training loop, with logs and checkpoints."""

from selftune.tuner._plan import Progress
from selftune.tuner._result import TuningResult
from selftune.tuner._tuner import Tuner

__all__ = ["Progress", "Tuner", "TuningResult"]
