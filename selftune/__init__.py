"""Self-tuning training: hyperparameters tuned by gradient during one training run."""

from selftune import estimators, monitor, optim, penalties, rules, schedules, tuner
from selftune.averaging import Average
from selftune.estimators import OneStep, Trace
from selftune.optim import SGD, Adam, AdamW, Lion, RMSprop, SelfTuning
from selftune.replay import TunedSchedule, replay
from selftune.tuner import Tuner, TuningResult

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Average",
    "Lion",
    "OneStep",
    "RMSprop",
    "SelfTuning",
    "Trace",
    "TunedSchedule",
    "Tuner",
    "TuningResult",
    "estimators",
    "monitor",
    "optim",
    "penalties",
    "replay",
    "rules",
    "schedules",
    "tuner",
]
