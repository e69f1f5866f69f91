"""Slopes of the training loss along the last step, for the learning-rate sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selftune.method.settings import SliceSettings
from selftune.method.shards import by_rows, shard
from selftune.method.slices import Slice, choose

SHARE, MOST, LARGE = 1 / 10, 2**16, SliceSettings(least=1, each=256)
"""Share and maximum number of weights of a large tensor to use; small ones are used whole."""
MEASURABLE = 0.1
"""Steps shorter than this share of the rounding error of the weights, ε ‖w‖, have no slope."""


@dataclass
class Slopes:
    """Gradients and weights of the last step, one for each tensor; empty before the first.

    Large tensors are represented by slices, whose slopes estimate those of the whole.

    Attributes:
        grads: Gradients at its start.
        weights: Weights at its start.
    """

    grads: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def along(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        reduce: Callable[[Tensor], Tensor] = lambda products: products,
        cuts: Sequence[Slice] | None = None,
    ) -> tuple[float, float] | None:
        """The slopes g · Δw at the start and at the end of the last step.

        Both are 0 if the step is so short that most weights are rounded to their previous values:
        which of them move, and so the sign of the slope, is then left to chance.

        Args:
            grads: Gradients at the current weights, on a new batch.
            weights: The current weights.
            reduce: Sums products over processes that hold parts of the weights.
            cuts: The slices of these parts; by default those of whole tensors.

        Returns:
            None at the first step, or if parts were added.
        """
        before = Slopes(self.grads, self.weights)
        errors = [torch.finfo(w.dtype).eps for w in weights]
        cuts = slices([w.shape for w in weights]) if cuts is None else cuts
        grads, weights = (
            [_kept(cut.scaled(t)) for cut, t in zip(cuts, tensors, strict=True)]
            for tensors in (grads, weights)
        )
        self.grads, self.weights = grads, weights
        known = [w.shape for w in before.weights] == [w.shape for w in weights]
        if not known:  # products of 0, because other processes may have theirs
            before = self
        moves = [now - then for then, now in zip(before.weights, weights, strict=True)]
        rounded = [w * e for w, e in zip(before.weights, errors, strict=True)]
        products = [
            torch.stack([(a * b).sum().double() for a, b in zip(*pair, strict=True)]).sum()
            for pair in ((before.grads, moves), (grads, moves), (moves, moves), (rounded, rounded))
        ]
        products.append(products[0].new_tensor(0.0 if known else 1.0))
        start, end, moved, error, unknown = reduce(torch.stack(products)).tolist()  # one host sync
        if unknown:
            return None
        return (0.0, 0.0) if moved < MEASURABLE**2 * error else (start, end)

    def forget(self) -> None:
        """Reset to the initial state."""
        self.grads, self.weights = [], []


def slices(shapes: Sequence[torch.Size]) -> list[Slice]:
    """The slices of whole tensors that represent them."""
    sizes = [shape.numel() for shape in shapes]
    shares = [min(SHARE, MOST / max(1, size)) for size in sizes]
    return [choose([[s]], share, LARGE)[0] for s, share in zip(shapes, shares, strict=True)]


def sharded(params: Sequence[Tensor]) -> list[Slice] | None:
    """This process's part of the slices of sharded tensors; None if not all are divided by rows."""
    if not all(by_rows(p) for p in params):
        return None
    cuts = slices([p.shape for p in params])
    return [shard(cut, [p]) for cut, p in zip(cuts, params, strict=True)]


def _kept(tensor: Tensor) -> Tensor:
    """A copy, at least in float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
