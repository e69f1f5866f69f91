"""Which entries of which parameters belong to one unit, over all layers that share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Channels:
    """The units along one axis of a value.

    Attributes:
        axis: The axis, from 0.
        ids: The unit of each position.
        zero: Whether each is 0 for every input, shape (positions,), bool.
    """

    axis: int
    ids: list[int]
    zero: Tensor

    def shifted(self) -> Channels:
        """The units after an operation that does not map 0 to 0."""
        return Channels(self.axis, self.ids, torch.zeros_like(self.zero))


@dataclass
class Cut:
    """A tensor of a module with an axis of units.

    Attributes:
        name: Name of its parameter or buffer.
        ids: The unit of each position.
        sizes: Attributes of the module with the length of the axis.
        path: The module's name in the model.
    """

    module: nn.Module
    name: str
    axis: int
    ids: list[int]
    sizes: Sequence[str]
    path: str


@dataclass
class Units:
    """Units of a model, as sets of joined ids.

    Units that are added to one another, or that share a parameter, are joined. A unit can be
    removed if it is 0 for all of its users.

    Attributes:
        cuts: Axes that are cut when units are removed, by tensor and axis.
    """

    cuts: dict[tuple[int, int], Cut] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)
    _needed: set[int] = field(default_factory=set)

    def new(self, count: int) -> list[int]:
        """Ids of new units."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return list(range(start, start + count))

    def root(self, unit: int) -> int:
        """The id that represents all units joined with this one."""
        while self._parents[unit] != unit:
            self._parents[unit] = unit = self._parents[self._parents[unit]]
        return unit

    def join(self, some: Sequence[int], others: Sequence[int]) -> None:
        """Join units pair by pair."""
        for a, b in zip(some, others, strict=True):
            self._parents[self.root(a)] = self.root(b)

    def use(self, channels: Channels) -> None:
        """Mark units read by a layer with a column for each; units that are not 0 are needed."""
        for unit, zero in zip(channels.ids, channels.zero.tolist(), strict=True):
            (self._used if zero else self._needed).add(unit)

    def need(self, *values: Channels | None) -> None:
        """Mark units as needed, because an operation requires all of them."""
        for value in values:
            self._needed.update(() if value is None else value.ids)

    def cut(
        self, path: str, module: nn.Module, name: str, axis: int, ids: list[int],
        sizes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Record that a tensor has an axis of units; a repeated axis joins its units."""
        tensor = getattr(module, name)
        if tensor is None:
            return
        known = self.cuts.setdefault(
            (id(tensor), axis), Cut(module, name, axis, ids, sizes, path)
        )  # fmt: skip
        self.join(known.ids, ids)

    def removable(self) -> set[int]:
        """The units that are 0 for all users, by root."""
        return {self.root(u) for u in self._used} - {self.root(u) for u in self._needed}

    def removed(self, warn: Callable[[str], None]) -> set[int]:
        """The units to remove, by root; at least one unit of every axis is kept.

        Args:
            warn: Called with the name of each module whose units are all closed.
        """
        gone = self.removable()
        named: set[str] = set()
        for cut in self.cuts.values():
            if all(self.root(u) in gone for u in cut.ids):
                gone.discard(self.root(cut.ids[0]))
                if cut.path not in named:
                    warn(cut.path)
                named.add(cut.path)
        return gone

    def remove(self, gone: set[int]) -> None:
        """Cut all tensors down to the remaining units."""
        for cut in self.cuts.values():
            keep = torch.tensor([i for i, u in enumerate(cut.ids) if self.root(u) not in gone])
            tensor = getattr(cut.module, cut.name)
            if len(keep) < len(cut.ids):
                smaller = tensor.detach().index_select(cut.axis, keep.to(tensor.device)).clone()
                if isinstance(tensor, nn.Parameter):
                    smaller = nn.Parameter(smaller, tensor.requires_grad)
                setattr(cut.module, cut.name, smaller)
            for size in cut.sizes:
                setattr(cut.module, size, len(keep))


class Tracked(fx.Interpreter):
    """A model's graph with the units of its values.

    Attributes:
        units: All units, with the tensors that are cut with them.
        channels: Units of each node's value; None if it has none, or they must be kept.
        values: The value of each node on the example.
        pieces: Units of the parts of values that are tuples.
        threshold: Largest absolute value of a closed gate.
    """

    def __init__(self, graph: fx.GraphModule, threshold: float) -> None:
        super().__init__(graph)
        self.units = Units()
        self.channels: dict[fx.Node, Channels | None] = {}
        self.values: dict[fx.Node, Any] = {}
        self.pieces: dict[fx.Node, list[Any]] = {}
        self.threshold = threshold
        self.ahead = threshold == math.inf  # all gates closed, before or during training

    def keep(self, path: str, module: nn.Module, name: str, axis: int) -> None:
        """Keep an axis of a tensor whole, also if another call of its module has units along it."""
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor) and tensor.ndim > axis:
            ids = self.units.new(tensor.shape[axis])
            self.units.cut(path, module, name, axis, ids)
            self.units.need(Channels(0, ids, torch.zeros(len(ids), dtype=torch.bool, device="cpu")))

    def _of(self, args: Any) -> list[Channels | None]:
        """The units of all nodes among arguments, those of tuples last."""
        nodes = [a for a in tree_leaves(args) if isinstance(a, fx.Node)]
        inside = [leaf for n in nodes for leaf in tree_leaves(self.pieces.get(n, []))]
        return [self.channels[n] for n in nodes] + inside

    def unknown(self, node: fx.Node) -> Channels | None:
        """Keep all units that enter a node, because its effect on them is unknown; return None."""
        self.units.need(*self._of((node.args, node.kwargs)))
        return None

    def join(
        self, node: fx.Node, those: Sequence[Channels], zero: Callable[[Tensor, Tensor], Tensor]
    ) -> Channels | None:
        """Join the units of several values, pair by pair; the result is 0 where ``zero`` says."""
        if len({(c.axis, len(c.ids)) for c in those}) != 1:
            return self.unknown(node)
        for one in those[1:]:
            self.units.join(those[0].ids, one.ids)
        return Channels(those[0].axis, those[0].ids, reduce(zero, (c.zero for c in those)))
