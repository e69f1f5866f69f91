"""Training and evaluation modes of modules, and torch's inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the mode of every module after the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Creates tensors that later steps may change in place, also under ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within a block."""
    with modes_kept(model):
        model.eval()
        yield
