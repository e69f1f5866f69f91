"""The self-tuned optimizer inside a framework's wrapper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from selftune.optim import SelfTuningOptimizer

WRAPPED = ("_optimizer", "optimizer")
"""Attributes under which wrappers of Lightning, Fabric and Accelerate keep the optimizer."""


def unwrap(optimizer: Any) -> Any:
    """Return the self-tuned optimizer inside wrappers of Lightning, Fabric or Accelerate.

    Args:
        optimizer: A self-tuned optimizer, or a wrapper around one.

    Raises:
        TypeError: The inner optimizer is not self-tuned.

    Examples:
        >>> import torch, selftune as st
        >>> opt = st.AdamW(torch.nn.Linear(2, 1))
        >>> unwrap(opt) is opt
        True
    """
    inner = _inside(optimizer)
    if isinstance(inner, SelfTuningOptimizer):
        return inner
    raise TypeError(
        f"optimizer={type(inner).__name__} is not self-tuned: use st.AdamW, st.SGD, … or "
        "st.SelfTuning(inner)"
    )


def only(optimizers: Iterable[Any]) -> Any:
    """Return the one self-tuned optimizer among several."""
    inner = [_inside(optimizer) for optimizer in optimizers]
    tuned = [optimizer for optimizer in inner if isinstance(optimizer, SelfTuningOptimizer)]
    if len(tuned) == 1:
        return tuned[0]
    if not tuned:
        raise ValueError(
            f"none of the optimizers ({', '.join(type(o).__name__ for o in inner)}) is "
            "self-tuned: use st.AdamW, st.SGD, … or st.SelfTuning(inner)"
        )
    raise ValueError(
        f"{len(tuned)} self-tuned optimizers, but the callback supports only one: remove the "
        "callback and call each one's hyper_step in the training step, with its own loss"
    )


def _inside(optimizer: Any) -> Any:
    """Unwrap by attribute, because wrappers may report the inner optimizer's class."""
    while True:
        wrapped = [vars(optimizer)[n] for n in WRAPPED if n in vars(optimizer)]
        if not wrapped or not isinstance(wrapped[0], torch.optim.Optimizer):
            return optimizer
        optimizer = wrapped[0]
