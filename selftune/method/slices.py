"""The slice of the weights whose sensitivities are kept.

Sensitivities without curvature are elementwise. Those of a slice are therefore exact, and their
scaled inner product with an outer gradient estimates the one over all weights. A fortieth of the
weights is as good as all of them, within the noise of one validation batch, with a fortieth of the
memory and time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selftune.method.settings import SliceSettings
from selftune.update import Clock, Transition, Update

SHARE = 1 / 40
"""Default share of the weights with sensitivities."""


@dataclass(frozen=True)
class Slice:
    """Every ``stride``-th weight of a part, starting in the middle of the first stride.

    Attributes:
        stride: Distance between two weights of the slice; 1 for all weights.
        shards: If this process holds a shard of each tensor: the size of each shard, and the
            position in it of the first weight of the slice. Together the shards hold the slice
            of the whole tensor.
    """

    stride: int = 1
    shards: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def root(self) -> float:
        """√stride: with this factor the squared length of a slice estimates that of the whole."""
        return math.sqrt(self.stride)

    def take(self, whole: Tensor) -> Tensor:
        """The weights of the slice, as a view if possible; with stride 1 the tensor itself."""
        if self.stride == 1:
            return whole
        if self.shards:
            parts = whole.reshape(-1).split([size for size, _ in self.shards])
            places = [first for _, first in self.shards]
            return torch.cat([p[at :: self.stride] for p, at in zip(parts, places, strict=True)])
        return whole.reshape(-1)[self.stride // 2 :: self.stride]

    def firsts(self, sizes: Sequence[int]) -> list[int]:
        """Position of the first weight of the slice in each concatenated tensor."""
        if self.shards:
            return [first for _, first in self.shards]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        return [(self.stride // 2 - start) % self.stride for start in starts]

    def scaled(self, whole: Tensor) -> Tensor:
        """The slice times √stride; inner products of such slices estimate those of the whole.

        Examples:
            >>> x = torch.arange(16.0)
            >>> float(x @ x), float(Slice(4).scaled(x).square().sum())
            (1240.0, 1344.0)
        """
        return self.rooted(self.take(whole))

    def rooted(self, kept: Tensor) -> Tensor:
        """A vector over the slice times √stride."""
        return kept if self.stride == 1 else kept * self.root

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """Number of weights of the slice in each concatenated tensor."""
        return [
            len(range(first, size, self.stride))
            for first, size in zip(self.firsts(sizes), sizes, strict=True)
        ]

    def of(self, step: Transition) -> Transition:
        """The record of a step, restricted to the slice."""
        if self.stride == 1:
            return step
        size = step.params.numel()

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {n: cut(v) for n, v in value.items()}
            if isinstance(value, Clock):
                return Clock(*map(cut, value))
            whole = isinstance(value, Tensor) and value.numel() == size
            return self.take(value) if whole else value

        return Transition(*map(cut, step))


WHOLE = Slice()


def choose(
    parts: Sequence[Sequence[torch.Size]],
    share: float,
    settings: SliceSettings,
    *,
    by_tensor: bool = False,
) -> list[Slice]:
    """Choose the slice of each part.

    A stride that divides the length of a row would select the same columns of all rows, so strides
    are coprime to all dimensions except the first.

    Args:
        parts: Shapes of the concatenated tensors of each part.
        share: Minimum share of the weights; the default is limited by ``settings.most``.
        settings: Minimum and maximum sizes.
        by_tensor: Whether each tensor has its own hyperparameters.

    Examples:
        >>> linear = [torch.Size((1024, 784)), torch.Size((1024,))]
        >>> choose([linear], 1 / 16, SliceSettings())
        [Slice(stride=15)]
        >>> choose([linear], 1.0, SliceSettings())
        [Slice(stride=1)]
        >>> choose([[torch.Size((50_000, 5_000))]], SHARE, SliceSettings())
        [Slice(stride=237)]
    """
    total = sum(shape.numel() for shapes in parts for shape in shapes)
    if share == SHARE and total:
        share = min(share, settings.most / total)
    most = min(int(1 / share + 1e-9), total // settings.least)
    slices = []
    for shapes in parts:
        sizes = [shape.numel() for shape in shapes]
        smallest = min(sizes) if by_tensor else sum(sizes)
        stride = max(1, min(most, smallest // settings.each))
        rows = math.prod(d for shape in shapes for d in shape[1:])
        while math.gcd(stride, rows) > 1:
            stride -= 1
        slices.append(Slice(stride))
    return slices


def wanted(
    tangents: float | torch.dtype | None, update: Update, whole: object | None
) -> tuple[float, torch.dtype | None]:
    """Share of the weights with sensitivities, and their dtype (None: that of the weights).

    Args:
        tangents: A share, or a dtype for all weights.
        update: The weight step.
        whole: The whole-step estimator, if there is one.

    Raises:
        ValueError: A share is given, but all sensitivities are needed.
    """
    if tangents is None or isinstance(tangents, torch.dtype):
        return 1.0, tangents
    needs = [p.name for p in update.penalties if not p.elementwise]
    if whole is None and not needs:
        return float(tangents), None
    if tangents not in (1, SHARE):
        what = f"estimator={whole}" if whole is not None else f"penalty {needs[0]!r}"
        raise ValueError(
            f"tangents={tangents}: {what} needs the sensitivities of all weights: leave tangents "
            "out, or pass a dtype"
        )
    return 1.0, None
