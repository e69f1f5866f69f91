"""Self-tuning training: hyperparameters tuned by gradient during one training run."""

from selftune import estimators, monitor, optim, penalties, rules, schedules
from selftune.averaging import Average
from selftune.estimators import OneStep, Trace
from selftune.optim import SGD, Adam, AdamW, Lion, RMSprop, SelfTuning

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
    "estimators",
    "monitor",
    "optim",
    "penalties",
    "rules",
    "schedules",
]
