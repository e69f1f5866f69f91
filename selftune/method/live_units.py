"""Live units: units with a non-zero gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def live_units(grads: Sequence[Tensor], present: Sequence[bool] | None = None) -> Tensor:
    """Number of units with a gradient in each layer: non-zero rows of its matrix (output units).

    A ReLU that no example activates has a zero row. If all parameters are vectors, their entries
    are counted.

    Args:
        grads: Gradients in the shapes of the parameters.
        present: Which of them exist; None: all. A layer that is frozen or unused has none.

    Returns:
        The numbers, shape (matrices,), in float32; NaN for missing gradients.

    Examples:
        >>> grads = [torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 3.0]]), torch.ones(5)]
        >>> live_units(grads), live_units(grads, [False, True])
        (tensor([2.]), tensor([nan]))
    """
    places = layers(grads)
    rows = [g.flatten(1) if g.ndim >= 2 else g.reshape(-1, 1) for g in (grads[i] for i in places)]
    lengths = [torch.linalg.vector_norm(m, 1, dim=1) for m in rows]  # faster than any()
    counts = torch.stack([(length != 0).sum() for length in lengths]).float()
    if present is None or all(present):
        return counts
    missing = torch.tensor([not present[i] for i in places], device=counts.device)
    return counts.masked_fill(missing, torch.nan)


def layers(params: Sequence[Tensor]) -> list[int]:
    """Indices of the parameters whose units are counted: matrices, or all if there are none."""
    return [i for i, p in enumerate(params) if p.ndim >= 2] or list(range(len(params)))
