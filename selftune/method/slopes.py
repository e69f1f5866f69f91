"""Slopes of the training loss along the last step, for the learning-rate sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Slopes:
    """Gradients and weights of the last step, part by part; nothing before the first.

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
    ) -> tuple[float, float] | None:
        """The slopes g · Δw at the start and at the end of the step that led here.

        Args:
            grads: Gradients here, of a batch that the step has not seen; copied.
            weights: Weights here; copied.
            reduce: Sums products over processes that hold parts of the weights.

        Returns:
            None at the first step, or where parts were added.
        """
        before = Slopes(self.grads, self.weights)
        self.grads, self.weights = [g.clone() for g in grads], [w.clone() for w in weights]
        if [w.shape for w in before.weights] != [w.shape for w in weights]:
            return None
        moves = [now - then for then, now in zip(before.weights, weights, strict=True)]
        products = [
            torch.stack([(g * d).sum().double() for g, d in zip(some, moves, strict=True)]).sum()
            for some in (before.grads, grads)
        ]
        start, end = reduce(torch.stack(products)).tolist()  # waits once
        return start, end

    def forget(self) -> None:
        """Begin anew."""
        self.grads, self.weights = [], []
