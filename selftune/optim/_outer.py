"""Gradients of a validation loss, without a trace in the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selftune.optim._block import Block
from selftune.optim._checks import check_dependence
from selftune.optim._ranks import is_sharded


def outer_gradients(loss: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """The joined gradients of every block, zeros where the loss does not depend on a parameter.

    Raises:
        ValueError: The loss depends on none of them.
    """
    grads = _gradients(loss, [p for b in blocks for p in b.params])
    check_dependence(list(grads.values()))
    return [
        b.layout.flatten(
            [torch.zeros_like(p) if (g := grads.get(p)) is None else g for p in b.params]
        )
        for b in blocks
    ]


def _gradients(loss: Tensor, params: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
    """Gradients of a loss that leave ``.grad`` as it was.

    Sharded parameters get theirs only through ``backward``, whose hooks reduce them.
    """
    leaves = [p for p in params if p.requires_grad]
    if not any(is_sharded(p) for p in leaves):
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return dict(zip(leaves, found, strict=True))
    kept = [p.grad for p in leaves]
    for param in leaves:
        param.grad = None
    try:
        loss.backward()
        return {p: p.grad for p in leaves}
    finally:
        for param, grad in zip(leaves, kept, strict=True):
            param.grad = grad
