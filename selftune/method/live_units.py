"""Live units: units with a non-zero gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def live_units(grads: Sequence[Tensor]) -> Tensor:
    """Number of units with a gradient in each layer: non-zero rows of its matrix (output units).

    A ReLU that no example activates has a zero row. If all parameters are vectors, their entries
    are counted.

    Args:
        grads: Gradients in the shapes of the parameters.

    Returns:
        The numbers, shape (matrices,), in float32.

    Examples:
        >>> live_units([torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 3.0]]), torch.ones(5)])
        tensor([2.])
    """
    return torch.stack([(m != 0).any(1).sum() for m in _matrices(grads)]).float()


def uncounted(grads: Sequence[Tensor]) -> Tensor:
    """The result of :func:`live_units` where units are not counted: NaN."""
    return grads[0].new_full((len(_matrices(grads)),), torch.nan, dtype=torch.float32)


def _matrices(grads: Sequence[Tensor]) -> list[Tensor]:
    return [g.flatten(1) for g in grads if g.ndim >= 2] or [g.reshape(-1, 1) for g in grads]
