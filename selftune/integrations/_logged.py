"""Hyperparameters as the loggers of frameworks take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logged(opt: Any, loss: Tensor) -> dict[str, float]:
    """Return the validation loss and every hyperparameter, ``hyper/lr`` for one; groups numbered.

    Args:
        opt: The self-tuned optimizer.
        loss: What ``hyper_step`` returned.
    """
    found = {"hyper/loss": float(loss)}
    for name, value in opt.hparams.items():
        if isinstance(value, (list, tuple)):
            found |= {f"hyper/{name}/{i}": float(v) for i, v in enumerate(value)}
        else:
            found[f"hyper/{name}"] = float(value)
    return found
