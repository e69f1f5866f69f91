"""Update rules: pure, and differentiable in every hyperparameter."""

from selftune.rules._base import AbstractRule, Dots, Evaluation
from selftune.rules.adam import Adam, AdamW
from selftune.rules.lion import Lion
from selftune.rules.mixture import Mixture
from selftune.rules.muon import Muon
from selftune.rules.plain import PlainOptimizer, Untuned
from selftune.rules.rmsprop import RMSprop
from selftune.rules.sgd import SGD

__all__ = [
    "SGD",
    "AbstractRule",
    "Adam",
    "AdamW",
    "Dots",
    "Evaluation",
    "Lion",
    "Mixture",
    "Muon",
    "PlainOptimizer",
    "RMSprop",
    "Untuned",
]
