"""The displacement ratio: whether a higher learning rate would lead further.

Moves that point at random lead away like a random walk, whose squared distance is the sum of the
moves' squares. Weights that have come further follow a drift, and longer steps would lead them
further still; weights that have come less far oscillate, and longer steps would only add noise.
The hypergradient of the learning rate does not see this: it is the weights' displacement against
the slope of the validation loss, and asks for higher rates as long as the average descends at all,
though it might descend faster at a lower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.method.averaging import move_towards
from selftune.method.settings import DisplacementLimit

Reduce = Callable[[Tensor], Tensor]


class Displacement(NamedTuple):
    """The weights' displacement from their past, against a random walk.

    The ratio is ``S = ‖w − c‖ / √(Σ aⱼ² ‖Δⱼ‖²)`` with ``aⱼ = j (j + 1) / (k (k + 1))``. The moves
    Δ₁ … Δₖ are segments of some twenty steps, and c is the mean of where they began, the j-th in
    proportion to j, so that ``w − c = Σ aⱼ Δⱼ``: the longer ago a move was, the less it counts.
    Where few batches make an epoch, their noise cancels within it, which looks like an oscillation
    from step to step, but not from segment to segment.

    Attributes:
        centre: c, one tensor a part of the weights.
        mark: Weights at the end of the last segment, likewise.
        squares: The sum under the root, shape (1,), float64.
        since: Steps taken at the end of the last segment, shape (1,).
        segments: k, shape (1,).

    Source: the distance over gradients of Ivgi et al. 2023 (DoG), by whose rule such a ratio, of
    steps and from the start, is 1; as a limit, and of segments, this library.
    """

    centre: list[Tensor]
    mark: list[Tensor]
    squares: Tensor
    since: Tensor
    segments: Tensor

    @classmethod
    def begin(cls, weights: Sequence[Tensor], step: Tensor) -> Displacement:
        """At the start of a run, or of its continuation after a rewind."""
        centre, mark = ([w.clone() for w in weights] for _ in range(2))
        squares, segments = torch.zeros_like(step, dtype=torch.float64), torch.zeros_like(step)
        return cls(centre, mark, squares, step.clone(), segments)

    def square(self, weights: Sequence[Tensor], reduce: Reduce) -> Tensor:
        """S² at weights, shape (1,); NaN before the end of the first segment."""
        found = reduce(_square_distance(weights, self.centre)).to(self.squares)
        return torch.where(self.squares > 0, found / self.squares, math.nan)

    def update(
        self, weights: Sequence[Tensor], step: Tensor, limit: DisplacementLimit, reduce: Reduce
    ) -> Displacement:
        """Take in weights; where a segment has ended, another begins. Tensors are reused."""
        ended = step - self.since >= limit.segment
        segments = self.segments + ended
        # Where the segment began enters c with weight 2/(k + 1): the j-th counts by its number.
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
        """From new weights on; tensors are reused."""
        for place in (self.centre, self.mark):
            for tensor, now in zip(place, weights, strict=True):
                tensor.copy_(now)
        zeros = torch.zeros_like(self.squares)
        since = torch.zeros_like(self.since) + step
        return self._replace(squares=zeros, since=since, segments=torch.zeros_like(self.segments))


def _square_distance(here: Sequence[Tensor], there: Sequence[Tensor]) -> Tensor:
    wide = [torch.promote_types(a.dtype, torch.float32) for a in here]
    parts = zip(here, there, wide, strict=True)
    norms = [torch.linalg.vector_norm(a - b, dtype=dtype) for a, b, dtype in parts]
    return torch.stack([n.double().square() for n in norms]).sum()
