"""The step that nobody tracks, in place by one kernel of torch.

Most steps of a run are of this kind: nothing is needed of them but where weights and rule state
end, and the pure step makes some thirty small tensors on the way there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.rules._base import InPlace
from selftune.update import Update


def kernel(update: Update, values: Mapping[str, Any]) -> InPlace | None:
    """The kernel that takes the update's step at these values, if there is one.

    Args:
        update: The weight step.
        values: Hyperparameters and options: numbers; a value a tensor has no kernel.
    """
    if update.penalties or any(isinstance(v, Tensor) for v in values.values()):
        return None
    return update.rule.in_place(values)


def plain(params: list[Tensor], grads: list[Tensor | None]) -> bool:
    """Whether kernels can take tensors as they are: dense, whole, of one layout with the state."""
    return all(
        g is not None and not g.is_sparse and g.dtype == p.dtype
        and g.is_contiguous() and p.is_contiguous()
        for p, g in zip(params, grads, strict=True)
    )  # fmt: skip


def finite(grads: list[Tensor]) -> bool:
    """Whether all gradients are finite; waits for a GPU."""
    return math.isfinite(float(torch.stack(torch._foreach_norm(grads)).sum()))
