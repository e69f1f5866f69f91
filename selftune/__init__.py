"""Self-tuning training: hyperparameters tuned by gradient during one training run."""

from selftune import (
    control,
    estimators,
    hypernet,
    method,
    monitor,
    nn,
    optim,
    penalties,
    rules,
    schedules,
    structure,
    testing,
    tuner,
)
from selftune.estimators import (
    BestResponse,
    Forward,
    Implicit,
    OneStep,
    Trace,
    Unrolled,
    hypergradient,
)
from selftune.functionalize import as_problem
from selftune.holdout import HeldOut, HoldOut
from selftune.linear_solve import CG, Neumann, Nystrom
from selftune.method.averaging import Average
from selftune.optim import SGD, Adam, AdamW, Lion, Mixture, Muon, RMSprop, SelfTuning
from selftune.problem import Problem
from selftune.replay import TunedSchedule, replay
from selftune.rules.muon import muon_groups
from selftune.tuner import Tuner, TuningResult
from selftune.update import Update

__version__ = "0.1.0"

__all__ = [
    "CG",
    "SGD",
    "Adam",
    "AdamW",
    "Average",
    "BestResponse",
    "Forward",
    "HeldOut",
    "HoldOut",
    "Implicit",
    "Lion",
    "Mixture",
    "Muon",
    "Neumann",
    "Nystrom",
    "OneStep",
    "Problem",
    "RMSprop",
    "SelfTuning",
    "Trace",
    "TunedSchedule",
    "Tuner",
    "TuningResult",
    "Unrolled",
    "Update",
    "as_problem",
    "control",
    "estimators",
    "hypergradient",
    "hypernet",
    "method",
    "monitor",
    "muon_groups",
    "nn",
    "optim",
    "penalties",
    "replay",
    "rules",
    "schedules",
    "structure",
    "testing",
    "tuner",
]
