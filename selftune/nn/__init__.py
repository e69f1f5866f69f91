"""Layers, losses and augmentation whose strengths are hyperparameters."""

from selftune.nn._base import Stochastic, Strength, Tunable, own_counters, tunables, uniform
from selftune.nn.augment import (
    Augment,
    Brightness,
    Contrast,
    Cutout,
    Mixup,
    Noise,
    Scale,
    Translate,
)
from selftune.nn.dropout import DropConnect, Dropout, Dropout2d, EmbeddingDropout
from selftune.nn.losses import (
    ActivationPenalty,
    LabelSmoothing,
    TemporalPenalty,
    begin_pass,
    extra_loss,
)

__all__ = [
    "ActivationPenalty",
    "Augment",
    "Brightness",
    "Contrast",
    "Cutout",
    "DropConnect",
    "Dropout",
    "Dropout2d",
    "EmbeddingDropout",
    "LabelSmoothing",
    "Mixup",
    "Noise",
    "Scale",
    "Stochastic",
    "Strength",
    "TemporalPenalty",
    "Translate",
    "Tunable",
    "begin_pass",
    "extra_loss",
    "own_counters",
    "tunables",
    "uniform",
]
