"""Models sharded over the ranks by torch's ``fully_shard``, and the layout of a run's tensors.

A rank holds rows of every tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from selftune._flat import is_sharded, local
from selftune._trees import leaves
from selftune.method import Part, Slice, slopes
from selftune.method.shards import row_length, rows_of, shard
from selftune.tuner._group import Group
from selftune.tuner._run_state import RunState

LARGE = ("leaves", "frozen", "snapshots", "model", "loss_fn", "objective")
"""Entries of checkpoints that grow with the weights."""
LEAST = 2**20
"""Smallest number of weights that are gathered in a collective of their own."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def shard_model(objective: nn.Module, device: torch.device, ranks: int) -> None:
    """Shard the model over all ranks, unless it is sharded already.

    Elements of a ``Sequential`` or ``ModuleList`` (blocks, layers) that own at least ``LEAST``
    weights are gathered one after the other in a pass, and the rest together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for module in objective.children():
        params = list(module.parameters())
        if params and not any(map(is_sharded, params)):
            for block in [*blocks(module), module]:
                fully_shard(block, mesh=mesh)
    objective.to(device)  # buffers


def blocks(model: nn.Module, least: int = LEAST) -> list[nn.Module]:
    """Modules that are gathered on their own, inner ones first.

    Examples:
        >>> layers = [nn.Linear(4, 4), nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 9))]
        >>> [block.out_features for block in blocks(nn.Sequential(*layers), least=15)]
        [9, 4]
    """
    modules: list[nn.Module] = []
    claimed: set[int] = set()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for container in reversed(list(model.modules())):
        for element in container.children() if isinstance(container, CONTAINERS) else ():
            own = {id(p): p for p in element.parameters() if id(p) not in claimed}
            inside = Counter(id(p) for _, p in element.named_parameters(remove_duplicate=False))
            shared = any(inside[i] < uses[i] for i in own)  # weights tied to other modules
            size = sum(p.numel() for p in own.values())
            if isinstance(element, CONTAINERS) or shared or size < least:
                continue
            modules.append(element)
            claimed |= own.keys()
    return modules


def from_first(group: Group, read: Callable[[], Any]) -> Any:
    """Read checkpoints on the first rank, and return them on all.

    If weights are sharded, other ranks get only shapes of the tensors that grow with the weights.
    """
    if not group.sharded:
        return group.from_first(read)
    tensors: list[Any] = []

    def shapes() -> Any:
        tensors.append(read())
        return _without_values(tensors[0])

    others = group.from_first(shapes)
    return tensors[0] if tensors else others


def _without_values(state: Any) -> Any:
    """Checkpoints whose large tensors have shapes only."""
    if isinstance(state, list):
        return [_without_values(s) for s in state]
    if not isinstance(state, dict):
        return state
    large = {k: v for k, v in state.items() if k in LARGE}
    return state | tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), large)


@dataclass(frozen=True)
class Placement:
    """Where the values of a tensor of the run belong.

    Attributes:
        part: Index of the part of the weights, or None for values that all ranks have.
        sliced: Whether it covers the slice of the part, instead of all weights.
        dim: The dimension of the weights.
    """

    part: int | None = None
    sliced: bool = False
    dim: int = 0


@dataclass(frozen=True)
class Shards:
    """The layout of a run's tensors over ranks; without sharding, all ranks have all values.

    Attributes:
        parts: The parameters of each part of the weights.
        cuts: The slice of each part, over whole parameters.
        joined: Whether the parameters of a part are concatenated to a vector.
    """

    group: Group = field(default_factory=Group)
    parts: Sequence[Sequence[Tensor]] = ()
    cuts: Sequence[Slice] = ()
    joined: bool = False

    @property
    def slices(self) -> list[Slice]:
        """This rank's part of the slices."""
        return [shard(c, p) for c, p in zip(self.cuts, self.parts, strict=True)]

    def places(self, run: RunState) -> list[Placement]:
        """The place of each tensor of a run, in the order of its leaves."""
        if not self.group.sharded:
            return [Placement()] * len(leaves(run))
        parts, method = range(len(self.parts)), run.method
        sliced = [Placement(i, sliced=True) for i in parts]
        places: list[Placement] = []
        for i, part in enumerate(method.parts):
            places += self._of_part(i, part)
        places += [Placement()] * len(leaves(method.hyper))
        for displacement in method.displacement:
            places += [*sliced, *sliced, *[Placement()] * len(displacement[2:])]
        for i, _ in enumerate(method.secants):
            places += [Placement(i, sliced=True, dim=1), sliced[i], sliced[i]]
        rest = [method.stiffness, *run[1:]]
        return places + [Placement()] * len(leaves(rest))

    @staticmethod
    def _of_part(index: int, part: Part) -> list[Placement]:
        whole, sliced = Placement(index), Placement(index, sliced=True)
        kept = [part.tangents, part.averaged, part.recent]
        return [
            *[whole] * len(leaves([part.params, part.rule, part.average])),
            *[sliced] * len(leaves(kept)),
            *[Placement()] * len(leaves(part.decay)),
        ]

    def of_slopes(self) -> list[Slice] | None:
        """This rank's part of the slices whose slopes the sweep measures; None: whole tensors."""
        if not self.group.sharded:
            return None
        return slopes.sharded([p for part in self.parts for p in part])

    # between a rank's shard and the whole tensor

    def whole(self, tensor: Tensor, place: Placement) -> Tensor:
        """A copy of the whole tensor on the first rank's CPU; called on all ranks."""
        if place.part is None:
            return tensor.detach().clone()
        pieces = [counts[self.group.rank] for counts in self._counts(place)]
        mine = tensor.detach().split(pieces, place.dim)
        both = zip(mine, self._counts(place), strict=True)
        return torch.cat([self.group.concatenate(m, c, place.dim) for m, c in both], place.dim)

    def shard(self, whole: Tensor, place: Placement) -> Tensor:
        """This rank's shard of the first rank's whole tensor; called on all ranks."""
        whole = self._received(whole)
        if place.part is None:
            return whole
        rank, pieces, start = self.group.rank, [], 0
        for counts in self._counts(place):
            pieces.append(whole.narrow(place.dim, start + sum(counts[:rank]), counts[rank]))
            start += sum(counts)
        return torch.cat(pieces, place.dim)

    def _received(self, tensor: Tensor) -> Tensor:
        if not self.group.sharded:
            return tensor
        return self.group.broadcast(tensor, self.parts[0][0].device)

    def shape(self, tensor: Tensor, place: Placement) -> torch.Size:
        shape = list(tensor.shape)
        if place.part is not None:
            shape[place.dim] = sum(sum(counts) for counts in self._counts(place))
        return torch.Size(shape)

    def _counts(self, place: Placement) -> list[list[int]]:
        """The extent of each parameter on each rank, along the dimension of the weights."""
        assert place.part is not None
        params, cut, ranks = self.parts[place.part], self.cuts[place.part], range(self.group.size)
        if place.sliced and cut.stride > 1:
            cuts = [shard(cut, params, rank) for rank in ranks]
            by_rank = [c.counts([size for size, _ in c.shards]) for c in cuts]
            return [list(counts) for counts in zip(*by_rank, strict=True)]
        each = [row_length(p) if self.joined else 1 for p in params]
        return [
            [len(rows_of(p, rank)) * length for rank in ranks]
            for p, length in zip(params, each, strict=True)
        ]

    # state dictionaries

    def weights_of(self, model: nn.Module) -> dict[str, Any]:
        """A copy of a model's state, whole on all ranks; on the CPU if it is sharded."""
        if self.group.sharded:
            return self.state_of(model, everywhere=True)
        return {
            k: v.detach().clone() if isinstance(v, Tensor) else v
            for k, v in model.state_dict().items()
        }

    def state_of(self, module: nn.Module, *, everywhere: bool = False) -> dict[str, Any]:
        """A copy of a module's state on the CPU, whole on the first rank or all; called on all."""

        def copied(value: Any) -> Any:
            if is_sharded(value):
                return self.whole_param(value, everywhere=everywhere)
            return value.detach().cpu().clone() if isinstance(value, Tensor) else deepcopy(value)

        return {name: copied(value) for name, value in module.state_dict().items()}

    def whole_param(self, tensor: Tensor, *, everywhere: bool = False) -> Tensor:
        """A copy of a parameter, whole on the first rank or all; called on all ranks."""
        if not is_sharded(tensor):
            return tensor.detach().clone()
        counts = [len(rows_of(tensor, rank)) for rank in range(self.group.size)]
        return self.group.concatenate(local(tensor.detach()), counts, everywhere=everywhere)

    def load_param(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy the first rank's whole tensor into a parameter; called on all ranks."""
        rows, whole = rows_of(tensor), self._received(whole)
        local(tensor).copy_(whole[rows.start : rows.stop] if is_sharded(tensor) else whole)

    @torch.no_grad()
    def load(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Load the first rank's state into a module; called on all ranks."""
        sharded = {n: t for n, t in module.state_dict().items() if is_sharded(t)}
        for name, tensor in sharded.items():
            self.load_param(tensor, state[name])
        rest = {
            n: self._received(v) if isinstance(v, Tensor) else v
            for n, v in state.items()
            if n not in sharded
        }
        module.load_state_dict(rest, strict=not sharded)
