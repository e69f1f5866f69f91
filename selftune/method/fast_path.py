"""The in-place weight step by a single torch kernel.

Most steps only need the new weights and rule state, while the pure step allocates about thirty
tensors. In tracked steps these are allocated for a slice of the weights only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.method.sensitivities import Moment
from selftune.method.slices import Slice
from selftune.rules._base import InPlace, State
from selftune.update import Transition, Update


def kernel(update: Update, values: Mapping[str, Any]) -> InPlace | None:
    """The kernel for the update's step at these values, or None.

    Args:
        update: The weight step.
        values: Hyperparameters and options as numbers; per-tensor values have no kernel.
    """
    if update.penalties or Tensor in map(type, values.values()):
        return None
    return update.rule.in_place(values)


def of_slice(
    update: Update, cut: Slice, tensors: tuple[Tensor, Tensor, State], moment: Moment
) -> Transition:
    """The step of a slice, computed before the kernel overwrites its inputs.

    Args:
        update: The weight step.
        cut: The slice.
        tensors: Copies of the slice of weights and gradients, and the whole rule state.
        moment: Time and hyperparameters of the step, for all weights.
    """
    params, grads, rule = tensors
    values, _, clock, *_ = moment
    if isinstance(clock.age, Tensor) and clock.age.ndim:
        clock = clock._replace(age=cut.take(clock.age))
    rule = {name: cut.take(state).clone() for name, state in rule.items()}
    return update.observed(params, grads, rule, values, clock)[2]


def plain(params: list[Tensor]) -> list[Tensor] | None:
    """All gradients, if kernels support the tensors: dense, contiguous, of equal dtype."""
    pairs = [(p, p.grad) for p in params]
    grads = [
        g for p, g in pairs if g is not None and not g.is_sparse and g.dtype == p.dtype
        and g.is_contiguous() and p.is_contiguous()
    ]  # fmt: skip
    return grads if len(grads) == len(params) else None


def norms(grads: list[Tensor]) -> Tensor:
    """The norm of each gradient, finite if and only if the gradient is; synchronises a GPU."""
    lengths = torch.stack(torch._foreach_norm(grads))
    if math.isfinite(sum(lengths.tolist())):
        return lengths
    return torch.stack(torch._foreach_norm(grads, 2, torch.float64))  # squares may overflow


def finite(grads: list[Tensor]) -> bool:
    """Whether all gradients are finite; synchronises a GPU."""
    return math.isfinite(sum(norms(grads).tolist()))
