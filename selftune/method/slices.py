"""The slice of the weights whose sensitivities are kept.

Sensitivities without curvature are elementwise: each weight responds for itself. Those of a few
weights are exact, then, and their inner products with an outer gradient estimate those of all
weights without bias. A fortieth of the weights is as good as all of them, within the noise of one
validation batch, and costs a fortieth of the memory and of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selftune.method.settings import SliceSettings
from selftune.update import Transition, Update

SHARE = 1 / 40
"""The share of the weights whose sensitivities are kept by default."""


@dataclass(frozen=True)
class Slice:
    """Every ``stride``-th weight of a part, from the middle of the first stride on.

    Attributes:
        stride: Weights from one kept to the next; 1: all are kept.
        shards: Where this process holds a shard of each tensor alone: its size, and the place of
            its first kept weight. The shards together keep what one process keeps of the whole.
    """

    stride: int = 1
    shards: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def root(self) -> float:
        """√stride: factor of a slice whose squared length estimates that of the whole."""
        return math.sqrt(self.stride)

    def take(self, whole: Tensor) -> Tensor:
        """The kept weights, as a view; all of them in their own shape where all are kept."""
        if self.stride == 1:
            return whole
        if self.shards:
            parts = whole.split([size for size, _ in self.shards])
            places = [first for _, first in self.shards]
            return torch.cat([p[at :: self.stride] for p, at in zip(parts, places, strict=True)])
        return whole.reshape(-1)[self.stride // 2 :: self.stride]

    def firsts(self, sizes: Sequence[int]) -> list[int]:
        """The place of the first kept weight in each of the tensors that are joined in a part."""
        if self.shards:
            return [first for _, first in self.shards]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        return [(self.stride // 2 - start) % self.stride for start in starts]

    def scaled(self, whole: Tensor) -> Tensor:
        """The kept weights times √stride; inner products of such estimate those of the whole.

        Examples:
            >>> x = torch.arange(16.0)
            >>> float(x @ x), float(Slice(4).scaled(x).square().sum())
            (1240.0, 1344.0)
        """
        return whole if self.stride == 1 else self.take(whole) * self.root

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """How many are kept of each of the tensors that are joined in a part."""
        return [
            len(range(first, size, self.stride))
            for first, size in zip(self.firsts(sizes), sizes, strict=True)
        ]

    def of(self, step: Transition) -> Transition:
        """The step of the kept weights."""
        if self.stride == 1:
            return step
        size = step.params.numel()

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.numel() == size:
                return self.take(value)
            return value

        return step._replace(
            params=self.take(step.params), grads=self.take(step.grads),
            state={n: cut(v) for n, v in step.state.items()},
            values={n: cut(v) for n, v in step.values.items()},
            clock=step.clock._replace(**{n: cut(v) for n, v in step.clock._asdict().items()}),
            direction=self.take(step.direction), total=self.take(step.total),
            after={n: cut(v) for n, v in step.after.items()}, moved=self.take(step.moved),
        )  # fmt: skip


WHOLE = Slice()


@dataclass(frozen=True)
class Pieces:
    """Where each tensor lies in the slice of a vector of them all.

    Attributes:
        sizes: Kept weights of each.
    """

    sizes: Sequence[int]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each tensor's part of a slice; leading dimensions are kept."""
        return list(flat.split(list(self.sizes), dim=-1))

    def sums(self, flat: Tensor) -> Tensor:
        """Sum over each tensor's part: shape (…, kept) to (…, tensors)."""
        return torch.stack([p.sum(-1) for p in self.views(flat)], dim=-1)


def choose(
    parts: Sequence[Sequence[torch.Size]],
    share: float,
    settings: SliceSettings,
    *,
    by_tensor: bool = False,
) -> list[Slice]:
    """The slice of every part.

    A stride that divides the length of a row would keep the same columns of all rows, so strides
    have no factor in common with a dimension but the first.

    Args:
        parts: Shapes of the tensors that are joined in each.
        share: Of all weights that is kept at least.
        settings: How few weights may be kept.
        by_tensor: Whether every tensor has hyperparameters of its own.

    Examples:
        >>> linear = [torch.Size((1024, 784)), torch.Size((1024,))]
        >>> choose([linear], 1 / 16, SliceSettings())
        [Slice(stride=15)]
        >>> choose([linear], 1.0, SliceSettings())
        [Slice(stride=1)]
    """
    total = sum(shape.numel() for shapes in parts for shape in shapes)
    most = min(int(1 / share + 1e-9), total // settings.least)
    found = []
    for shapes in parts:
        sizes = [shape.numel() for shape in shapes]
        smallest = min(sizes) if by_tensor else sum(sizes)
        stride = max(1, min(most, smallest // settings.each))
        rows = math.prod(d for shape in shapes for d in shape[1:])
        while math.gcd(stride, rows) > 1:
            stride -= 1
        found.append(Slice(stride))
    return found


def wanted(
    tangents: float | torch.dtype | None, update: Update, whole: object | None
) -> tuple[float, torch.dtype | None]:
    """The share of the weights whose sensitivities are kept, and their dtype; None: the weights'.

    Args:
        tangents: A share, or the dtype of all.
        update: The weight step.
        whole: The estimator of whole steps, if there is one.

    Raises:
        ValueError: A share of what is needed whole.
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
