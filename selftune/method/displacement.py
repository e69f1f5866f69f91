"""The displacement ratio: whether weights drift or oscillate.

In a random walk the expected squared displacement is the sum of the squared moves. Weights with a
larger displacement drift, and a higher learning rate would make them progress faster; weights with
a smaller one oscillate, and a higher rate would only add noise. The hypergradient of the learning
rate does not distinguish these cases: it is the inner product of the displacement and the gradient
of the validation loss, and raises the rate as long as the loss at the average falls, even if a
lower rate would be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._trees import copy_into
from selftune.method.averaging import move_towards
from selftune.method.settings import DisplacementLimit

Reduce = Callable[[Tensor], Tensor]
"""Sums a number over the processes that hold parts of the weights."""


class Displacement(NamedTuple):
    """The displacement of the weights, relative to a random walk.

    The ratio is ``S = ‖w − c‖ / √(Σ aⱼ² ‖Δⱼ‖²)`` with ``aⱼ = j (j + 1) / (k (k + 1))``. The moves
    Δ₁ … Δₖ are segments of about twenty steps, and c is the mean of their starting points, the j-th
    weighted by j, so that ``w − c = Σ aⱼ Δⱼ``: older moves count less. With few batches in an
    epoch, their noise cancels within the epoch, which looks like an oscillation between steps, but
    not between segments.

    Attributes:
        centre: c, one tensor for each part of the weights.
        mark: Weights at the end of the last segment, likewise.
        squares: The sum under the root, shape (1,), float64.
        since: Steps taken at the end of the last segment, shape (1,).
        segments: k, shape (1,).

    Source: Ivgi et al. 2023 (DoG) keep a similar ratio, over all steps since the start, at 1; the
    limit and the segments: this library.
    """

    centre: list[Tensor]
    mark: list[Tensor]
    squares: Tensor
    since: Tensor
    segments: Tensor

    @classmethod
    def begin(cls, weights: Sequence[Tensor], step: Tensor) -> Displacement:
        """The state at the start of a run."""
        centre, mark = ([w.clone() for w in weights] for _ in range(2))
        squares, segments = torch.zeros_like(step, dtype=torch.float64), torch.zeros_like(step)
        return cls(centre, mark, squares, step.clone(), segments)

    def square(self, weights: Sequence[Tensor], reduce: Reduce) -> Tensor:
        """S² at weights, shape (1,); NaN before the end of the first segment."""
        square = reduce(_square_distance(weights, self.centre)).to(self.squares)
        return torch.where(self.squares > 0, square / self.squares, math.nan)

    def update(
        self, weights: Sequence[Tensor], step: Tensor, limit: DisplacementLimit, reduce: Reduce
    ) -> Displacement:
        """Update with the current weights; start a new segment if one ended. Reuses tensors."""
        ended = step - self.since >= limit.segment
        segments = self.segments + ended
        # c ← c + 2/(k + 1) · (start of segment k − c): start j gets a weight proportional to j.
        share = torch.where(ended, 2 / (segments.double() + 1), 0.0)
        more = reduce(_square_distance(weights, self.mark)).to(self.squares)
        for centre, mark, now in zip(self.centre, self.mark, weights, strict=True):
            move_towards(centre, mark, share.squeeze(0).to(centre))
            mark.copy_(torch.where(ended.squeeze(0).to(mark.device), now, mark))
        return self._replace(
            squares=self.squares * (1 - share) ** 2 + torch.where(ended, more, 0.0),
            since=torch.where(ended, step, self.since),
            segments=segments,
        )

    def rewound(self, weights: Sequence[Tensor], step: Any) -> Displacement:
        """Restart from new weights; reuses tensors."""
        for place in (self.centre, self.mark):
            copy_into(place, weights)
        zeros = torch.zeros_like(self.squares)
        since = torch.zeros_like(self.since) + step
        return self._replace(squares=zeros, since=since, segments=torch.zeros_like(self.segments))


def _square_distance(here: Sequence[Tensor], there: Sequence[Tensor]) -> Tensor:
    wide = [torch.promote_types(a.dtype, torch.float32) for a in here]
    parts = zip(here, there, wide, strict=True)
    norms = [torch.linalg.vector_norm(a - b, dtype=dtype) for a, b, dtype in parts]
    return torch.stack([n.double().square() for n in norms]).sum()
