"""Hyperparameters in the format of frameworks' loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def numbered(hparams: Mapping[str, Any], sign: str) -> dict[str, float]:
    """Hyperparameters by name; those with several values are numbered: name, sign, number."""
    values: dict[str, float] = {}
    for name, value in hparams.items():
        if isinstance(value, (list, tuple)):
            values |= {f"{name}{sign}{i}": float(v) for i, v in enumerate(value)}
        else:
            values[name] = float(value)
    return values


def logged(opt: Any, loss: Tensor) -> dict[str, float]:
    """Return the validation loss, every hyperparameter, and the applied learning rate.

    ``hyper/lr`` is the tuned peak, ``lr`` the rate of the last step, schedules included; groups
    that differ are numbered.
    """
    metrics = {"hyper/loss": float(loss)}
    metrics |= {f"hyper/{name}": value for name, value in numbered(opt.hparams, "/").items()}
    rates = [float(group["applied_lr"]) for group in opt.param_groups]
    if len(set(rates)) == 1:
        return metrics | {"lr": rates[0]}
    return metrics | {f"lr/{i}": rate for i, rate in enumerate(rates)}
