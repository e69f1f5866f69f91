"""Blocks of a run, synchronised with torch's parameter groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selftune._flat import is_sharded, local
from selftune._modes import ordinary_tensors
from selftune.method.shards import by_rows, shard
from selftune.method.slices import Slice, choose
from selftune.method.snapshots import kinds, resolve
from selftune.optim._block import Block
from selftune.optim._engine import Engine
from selftune.optim._groups import Group, Groups

State = MutableMapping[Tensor, dict[str, Any]]

Kind = tuple[int, torch.Size, torch.dtype]
"""Identity, shape and dtype of a parameter."""
SCALED = {"centre", "mark"}
"""Keys of state over the slice that is scaled by √stride."""


class Assembly:
    """Makes the engine's blocks from parameter groups, and rebuilds them after changes."""

    def __init__(self, engine: Engine, groups: Groups) -> None:
        self._engine, self._groups = engine, groups
        self._built: list[list[Kind]] = []
        self._frozen: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """Whether the blocks do not exist yet."""
        return not self._built

    def over(self, engine: Engine) -> Assembly:
        """A copy for another engine, without blocks."""
        other = copy.copy(self)
        other._engine, other._built = engine, []
        return other

    def current(self, groups: Sequence[Group], state: State) -> list[Block]:
        """The blocks, rebuilt if parameters or their state were added, moved or replaced."""
        # At every step: size() is faster than shape.
        kinds = [[(id(p), p.size(), p.dtype) for p in g["params"]] for g in groups]
        blocks = self._engine.blocks
        thawed = any(p.requires_grad for p in self._frozen)
        if kinds == self._built and not thawed and not any(b.written(state) for b in blocks):
            return blocks
        self._check_kinds(groups, state)
        self._check_places(groups, state)
        self._rebuild(groups, state)
        self._built = kinds
        return self._engine.blocks

    @ordinary_tensors()
    def _rebuild(self, groups: Sequence[Group], state: State) -> None:
        """Make the blocks, with the state of known parameters."""
        if self._built or self._groups.laid_out:  # or a copy
            self._groups.take_up(groups)  # values written since the last step
        if self._built:
            self._engine.training_signal = None  # its shape may change
            self._engine.unused = None
            self._engine.buffers.grow()
        elif self._engine.clock.steps == 0:  # not in a copy
            self._groups.check(groups)
        trained = _trained(groups, state)
        self._recut(trained, state)
        self._groups.lay_out(groups, trained)
        self.make(groups, state)
        self.publish(groups)

    def _check_kinds(self, groups: Sequence[Group], state: State) -> None:
        """Raise an error if a shape or dtype changed; before the first step restart instead."""
        before = {
            key: (tuple(shape), dtype) for kinds in self._built for key, shape, dtype in kinds
        }
        present = [
            (name, before.get(id(p)), (tuple(p.shape), p.dtype))
            for name, p in named(groups)
            if p in state  # else the identity may be that of a parameter that was freed
        ]
        changed = [(name, old, now) for name, old, now in present if old not in (None, now)]
        if changed and self._engine.clock.steps:
            name, old, now = changed[0]
            raise ValueError(
                f"params: the shape or dtype of {name} has changed during the run, from {old} to "
                f"{now}: make a new optimizer; or assign a new nn.Parameter instead of .data, and "
                "pass it to add_param_group"
            )
        if changed:
            state.clear()
            self._engine.forget()

    def _check_places(self, groups: Sequence[Group], state: State) -> None:
        """Raise an error if a group or parameter moved: tuned values belong to positions."""
        if not (self._engine.clock.steps and self._groups.tuned):
            return
        before = {key: i for i, kinds in enumerate(self._built) for key, *_ in kinds}
        moved = [
            (before[id(p)], i)
            for i, group in enumerate(groups)
            for p in group["params"]
            if p in state and before.get(id(p), i) != i
        ]
        if moved or len(groups) < len(self._built):
            what = "parameters of group {} are in group {} now".format(*moved[0]) if moved else (
                f"{len(self._built) - len(groups)} of {len(self._built)} groups were removed"
            )  # fmt: skip
            raise ValueError(
                f"param_groups: {what}, but tuned hyperparameters belong to a group's position: "
                "restore the groups (a group without parameters may stay), or make a new optimizer"
            )

    def make(self, groups: Sequence[Group], state: State) -> None:
        """Concatenate the trained parameters of every group; their state is in ``state``."""
        engine, trained = self._engine, _trained(groups, state)
        for block in engine.blocks:
            block.sync()
        if engine.whole is not None and engine.blocks:  # not in a copy, which continues
            engine.whole.forget()
        if not any(trained):
            raise ValueError("params: none of the parameters requires a gradient")
        sensitivities = engine.method.sensitivities
        sharded = any(is_sharded(p) for params in trained for p in params)
        if sharded and not sensitivities.update.rule.elementwise:
            raise ValueError(
                f"params are sharded, but {type(sensitivities.update.rule).__name__} needs whole "
                "matrices: use DDP instead of FSDP2, or st.AdamW"
            )
        if sharded and engine.whole is not None:
            raise ValueError(
                "params are sharded, but this estimator needs whole vectors: use DDP instead of "
                "FSDP2, or the estimators Trace or OneStep"
            )
        if sharded:
            engine.reducer.check_copies([p for params in trained for p in params])
        weights = sum(p.numel() for params in trained for p in params)
        slots = engine.method.settings.stiff.slots(weights) if sensitivities.smooth else 0
        cuts, where = self._slices(trained), resolve(engine.snapshots, weights)
        stored = kinds(weights)
        if engine.controller.guard is not None:
            engine.controller.guard.good.hold("candidate" in stored)
        names = {p: name for name, p in named(groups)}
        blocks = [
            Block(
                params, [names[p] for p in params], [state[p] for p in params],
                sensitivities, self._groups.options(groups[i]), cuts.pop(0), slots, where, stored,
            )
            for i, params in enumerate(trained)
            if params
        ]  # fmt: skip
        engine.store.lay_out(blocks, slots, by_tensor=not engine.shifts.shared)
        engine.reducer.sharded = sharded
        engine.looks = {p: engine.looks[p] for p in engine.params if p in engine.looks}
        self._frozen = [p for g in groups for p in g["params"] if p not in state]

    def _slices(self, trained: Sequence[Sequence[Tensor]]) -> list[Slice]:
        engine = self._engine
        scopes = {tuned.scope for tuned in engine.shifts.rows.values()}
        cuts = choose(
            [[p.shape for p in params] for params in trained if params],
            engine.share, engine.method.settings.slices, by_tensor="tensor" in scopes,
        )  # fmt: skip
        return [
            shard(cut, params) if all(map(by_rows, params)) else Slice()
            for cut, params in zip(cuts, filter(None, trained), strict=True)
        ]

    def _recut(self, trained: Sequence[Sequence[Tensor]], state: State) -> None:
        """Keep the state of slices that change because parameters were added.

        Sensitivities outside the previous slice restart.
        """
        before = {
            id(p): (block.cut, first, block.sliced)
            for block in self._engine.blocks
            for p, first in zip(block.params, block.cut.firsts(block.layout.sizes), strict=True)
        }
        for params, cut in zip(filter(None, trained), self._slices(trained), strict=True):
            firsts = cut.firsts([local(p).numel() for p in params])
            for param, first in zip(params, firsts, strict=True):
                old, place, keys = before.get(id(param), (cut, first, set()))
                if (old.stride, place) == (cut.stride, first):
                    continue
                entry = state[param]
                for key in keys & entry.keys():
                    whole = entry.pop(key)
                    if old.stride == 1 and not key.startswith("secant"):
                        kept = whole.reshape(-1)[first :: cut.stride]
                        entry[key] = kept * cut.root if key in SCALED else kept.clone()

    def publish(self, groups: Sequence[Group]) -> None:
        """Write tuned values to the parameter groups, and prepare them for the steps."""
        self._engine.store.cached = self._groups.publish(groups, self._engine.blocks)


def named(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor]]:
    """The parameters, with names for error messages."""
    for index, group in enumerate(groups):
        params, names = group["params"], group.get("param_names") or ()
        if len(names) != len(params):  # there are none, or "params" alone was replaced
            names = [f"param_groups[{index}][{i}]" for i in range(len(params))]
        yield from zip(names, params, strict=True)


def match_names(groups: Sequence[Group], group: Group) -> Group:
    """A group whose parameters have names if those of the others do; torch does not mix them."""
    params = group.get("params") if isinstance(group, dict) else None
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    if not groups or params is None or isinstance(params, set):
        return group if params is None else {**group, "params": params}
    params = [params] if isinstance(params, Tensor) else params
    entries = [e if isinstance(e, tuple) else ("", e) for e in params]
    if not groups[0].get("param_names"):
        return {**group, "params": [param for _, param in entries]}
    place = f"param_groups[{len(groups)}]"
    named = [(name or f"{place}[{i}]", param) for i, (name, param) in enumerate(entries)]
    return {**group, "params": named}


def _trained(groups: Sequence[Group], state: State) -> list[list[Tensor]]:
    """Parameters of each group that are or were trained."""
    return [[p for p in g["params"] if p.requires_grad or p in state] for g in groups]
