"""Live units: units with a non-zero gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def live_units(grads: Sequence[Tensor]) -> Tensor:
    """Number of units with a gradient: non-zero rows of matrices (output units, channels).

    A ReLU that no example activates has a zero row. If all parameters are vectors, their entries
    are counted.

    Args:
        grads: Gradients in the shapes of the parameters.

    Returns:
        The number, shape (), in the gradients' dtype or float32.

    Examples:
        >>> int(live_units([torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 3.0]]), torch.ones(5)]))
        2
    """
    matrices = [g.flatten(1) for g in grads if g.ndim >= 2] or [g.reshape(-1, 1) for g in grads]
    return torch.stack([(m != 0).any(1).sum() for m in matrices]).sum().float()
