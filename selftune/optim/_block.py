"""The concatenated tensors of one parameter group, with views for torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._flat import Layout, local, swap
from selftune.control.final_weights import between
from selftune.method import Part, Sensitivities
from selftune.method.slices import Slice
from selftune.method.snapshots import copy
from selftune.method.stiff_directions import Secants
from selftune.optim._checks import check_gradient
from selftune.optim._shards import Rows, whole
from selftune.rules._base import InPlace

Entries = Sequence[dict[str, Any]]


class Look(NamedTuple):
    """A hash of the places of exact zeros in a parameter at a step, and at an earlier one."""

    step: int
    places: Any
    before: Any


class Block:
    """One parameter group's tensors as flat vectors.

    ``entries`` are the per-parameter dictionaries of ``optimizer.state``. The block is initialised
    from them, and they contain all saved state as views of its flat vectors, so torch's saving and
    loading work unchanged. ``sync`` writes the rule's state, which has new tensors at every step.

    Attributes:
        part: State of the method; its ``params`` are empty between steps.
        averages: The average, a view for every parameter.
        good: The last good weights.
        snapshots: Snapshots by kind: these and, in a small model, the candidate.
        centre, mark: State of the displacement.
        secants: Secant pairs, or empty.
        sliced: Keys of the state over the slice only.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        entries: Entries,
        sensitivities: Sensitivities,
        values: Mapping[str, Any],
        cut: Slice,
        pairs: int,
        snapshots: str,
        kinds: Sequence[str],
    ) -> None:
        self.params = list(params)
        self.layout, self.cut = Layout(params), cut
        self.pieces = cut.counts(self.layout.sizes)
        self._names = list(names)
        self._entries = list(entries)
        steps = [e["step"] if "step" in e else torch.zeros((), device="cpu") for e in entries]
        self._steps = torch.stack([torch.as_tensor(s, device="cpu").float().cpu() for s in steps])
        self._ages, self._lead = self._steps.tolist(), 0
        self._rule_views: dict[str, Sequence[Tensor]] = {}  # views in the entries, until a step
        weights = self.weights()
        self.scratch: dict[str, Tensor] = {}
        self._firsts = cut.firsts(self.layout.sizes)
        self._rows = [Rows(p, cut.stride, n) for p, n in zip(params, self._firsts, strict=True)]
        self.part = sensitivities.begin(weights, values, cut, tensors=len(params), fresh=True)
        weights = self.part.average
        self.snapshots = {kind: copy(weights, snapshots) for kind in kinds}
        self.good = self.snapshots["good"]
        kept = cut.scaled(weights)
        self.centre, self.mark = kept.clone(), kept.clone()
        self.secants = [Secants.begin(kept, pairs)] if pairs else []
        self._stale = False
        self._views: dict[str, list[Tensor]] = {}  # of the rule's state
        self._viewed: Mapping[str, Tensor] = {}
        known = [e["secant/changes"] for e in entries if "secant/changes" in e]
        if any(len(changes) != pairs for changes in known):  # the model has grown
            for entry in entries:
                for key in [k for k in entry if k.startswith("secant/")]:
                    del entry[key]
        self.averages = self.layout.views(self.part.average)
        for key, views in self._kept().items():
            for row, entry, view, name in zip(self._rows, self._entries, views, names, strict=True):
                # Saved, in the format of checkpoints or as this process's part; what does not fit
                # belongs to a parameter of another shape, which this one has replaced.
                saved = entry.get(key)
                fitting = None if saved is None else row.load(saved, view)
                if fitting is not None:
                    view.copy_(fitting)
                elif key in self.part.rule and saved is not None:
                    shapes = tuple(saved.shape), tuple(view.shape)
                    raise ValueError(
                        "state: {!r} of {} has shape {}, the parameter {}: carry its state over in "
                        "the new shape, or leave it out".format(key, name, *shapes)
                    )
                entry[key] = view
        self.part = self.part._replace(params=weights.new_empty(0))
        self.sliced = set(self._pieces())
        self._write_rule_views()

    def saved(self) -> list[dict[str, Tensor]]:
        """The state of each parameter in the format of checkpoints."""
        self.sync()
        wholes = {k: self.layout.views(t) for k, t in self._wholes().items()}
        entries: list[dict[str, Tensor]] = [{} for _ in self._rows]
        for key, views in (wholes | self._pieces()).items():
            sliced = self.cut.stride > 1 and key in self.sliced
            for row, entry, view in zip(self._rows, entries, views, strict=True):
                entry[key] = row.save(view) if sliced else whole(row.param, view)
        return entries

    def _wholes(self) -> dict[str, Tensor]:
        return {**self.part.rule, "average": self.part.average, **self.snapshots}

    def _pieces(self) -> dict[str, list[Tensor]]:
        """The state over the slice, a view for every parameter."""
        part = self.part
        kept = {"centre": self.centre, "mark": self.mark}
        kept |= {f"sensitivity/{i}": t for i, t in enumerate(part.averaged)}
        kept |= {f"recent/{i}": t for i, t in enumerate(part.recent)}
        kept |= _tangents("tangent", part.tangents)
        for secants in self.secants:
            kept |= {f"secant/{name}": t for name, t in secants._asdict().items()}
        if self.cut.stride == 1:
            return {k: self.layout.views(t) for k, t in kept.items()}
        return {k: list(t.split(self.pieces, -1)) for k, t in kept.items()}

    def _kept(self) -> dict[str, Sequence[Tensor]]:
        """All saved state by key: a view for every parameter."""
        ones: dict[str, Tensor] = {}  # one number for each parameter
        for unit in self.part.decay:
            ones |= {"decay": unit.averaged, **_tangents("decay", unit.tangents)}
        return (
            {k: self.layout.views(t) for k, t in self._wholes().items()}
            | self._pieces()
            | {k: t.unbind() for k, t in ones.items()}
        )

    @property
    def keys(self) -> set[str]:
        """Keys of the saved state of a parameter, without the rule's state."""
        return {"step", *self._kept()} - set(self.part.rule)

    def sync(self) -> None:
        """Write the rule's state to torch's dictionaries; called on access only."""
        if self._stale:
            self._write_rule_views()
            self._stale = False

    def _write_rule_views(self) -> None:
        rule = {name: self.layout.views(flat) for name, flat in self.part.rule.items()}
        self._rule_views = {"step": self._steps.unbind(), **rule}
        for name, views in self._rule_views.items():
            for entry, view in zip(self._entries, views, strict=True):
                entry[name] = view

    def written(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the rule's state was cleared or replaced since ``sync`` wrote its views."""
        if self._stale:
            return False
        return any(
            state.get(param) is not entry or any(entry.get(k) is not v[i] for k, v in views)
            for views in [self._rule_views.items()]
            for i, (param, entry) in enumerate(zip(self.params, self._entries, strict=True))
        )

    def _let_go(self) -> None:
        """Drop views of the rule's previous state, so that its memory is freed."""
        for entry in self._entries:
            for name in self.part.rule:
                entry.pop(name, None)
        self._views, self._viewed, self._stale, self._rule_views = {}, {}, True, {}

    def weights(self) -> Tensor:
        """A copy of the concatenated weights."""
        return self.layout.flatten([p.detach() for p in self.params])

    def before(self) -> Tensor:
        """The concatenated weights, in a buffer reused at each step: allocating one takes long."""
        return self.layout.flatten(self.params, out=self._kept_memory("weights"))

    def _kept_memory(self, use: str) -> Tensor:
        if use not in self.scratch:
            self.scratch[use] = self.part.average.new_empty(self.layout.numel)
        return self.scratch[use]

    def slice(self, tensors: Sequence[Tensor]) -> Tensor:
        """The slices of tensors shaped like the parameters, concatenated."""
        if self.cut.stride == 1:
            return self.layout.flatten(tensors)
        return self.joined([self.piece(i, t) for i, t in enumerate(tensors)])

    def piece(self, index: int, tensor: Tensor) -> Tensor:
        """A view of the slice of a tensor shaped like a parameter."""
        flat = local(tensor).detach().reshape(-1)
        return flat if self.cut.stride == 1 else flat[self._firsts[index] :: self.cut.stride]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces)).to(self.layout.dtype)

    def scaled(self, tensors: Sequence[Tensor]) -> Tensor:
        """``slice`` times √stride."""
        return self.cut.rooted(self.slice(tensors))

    # other weights in place

    def copies(self) -> list[Tensor]:
        return [local(p).detach().clone() for p in self.params]

    def put(self, weights: Sequence[Tensor]) -> None:
        torch._foreach_copy_([local(p) for p in self.params], list(weights))

    def exchange(self) -> None:
        swap(self.params, self.averages)

    def show(self, place: float, weights: Sequence[Tensor]) -> None:
        """Write the good (place -1), averaged (0) or given weights (1) into the parameters."""
        others = weights if place > 0 else self.layout.views(self.good)
        params = map(local, self.params)
        for param, view, other in zip(params, self.averages, others, strict=True):
            param.copy_(between(view, other, abs(place)))

    def slopes(self, index: int, grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """A parameter's ``g · Δw`` from good to averaged weights, and from averaged to others."""
        average, good = self.averages[index], self.layout.views(self.good)[index]
        grad = local(grad).to(average.dtype)
        ways = average - good, weights[index] - average
        return torch.stack([(grad * way).sum() for way in ways])

    def average_towards(self, share: float) -> None:
        """Move the average toward the parameters, in place."""
        torch._foreach_lerp_(self.averages, self.params, share)

    def gradient(self) -> tuple[Tensor, list[bool] | None]:
        """The concatenated gradients in a reused buffer, and which of them exist (None: all)."""
        grads = [p.grad for p in self.params]
        for name, grad in zip(self._names, grads, strict=True):
            if grad is not None:
                check_gradient(name, grad)
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return self.layout.flatten(present, out=self._kept_memory("gradients")), None
        pairs = zip(self.params, grads, strict=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        return self.layout.flatten(filled), [g is not None for g in grads]

    def step_in_place(self, kernel: InPlace, grads: list[Tensor], rate: float) -> None:
        """Step weights and state in place by a kernel."""
        rule = self.part.rule
        if self._viewed is not rule:
            self._views = {k: self.layout.views(v) for k, v in rule.items()}
            self._viewed = rule
        self.count()
        kernel(self.params, grads, self._views, [e["step"] for e in self._entries], rate)
        self._stale = True

    def count(self) -> None:
        self._steps.add_(1)
        self._lead += 1

    def ages(self) -> list[float]:
        """Number of previous updates of each tensor, for bias corrections."""
        return [a + self._lead for a in self._ages]

    def write(self, part: Part, moved: Tensor, counted: Sequence[bool] | None) -> None:
        """Store a part after a step, and write its weights into the parameters."""
        self.part = part._replace(params=moved.new_empty(0))
        self._let_go()
        self.layout.write(moved, self.params)
        if counted is None:
            self.count()
        else:
            self._steps.add_(torch.tensor(counted, device="cpu"))
            self._ages = [a + c for a, c in zip(self._ages, counted, strict=True)]

    def begin(self) -> None:
        """Reset average and good weights to the current weights."""
        for flat in (self.part.average, *self.snapshots.values()):
            self._fill(flat)
        kept, scaled = self.slice(self.params), self.scaled(self.params)
        for flat in self.part.recent:
            flat.copy_(kept)
        for flat in (self.centre, self.mark, *(s.last_params for s in self.secants)):
            flat.copy_(scaled)

    def _fill(self, flat: Tensor) -> None:
        for param, view in zip(self.params, self.layout.views(flat), strict=True):
            view.copy_(local(param))

    def snapshot(self, kind: str) -> None:
        if kind == "iterate":  # in the sweep, where the average is free, and exact
            self._fill(self.part.average)
        elif kind == "promote":
            self.good.copy_(self.snapshots["candidate"])
        else:
            self.snapshots[kind if kind == "candidate" else "good"].copy_(self.part.average)

    def go_back(self, *, swept: bool) -> None:
        """Return weights and average to the last good ones, or the sweep's iterate in the average.

        After a sweep the initial weights remain the good ones.
        """
        self.layout.write(self.part.average if swept else self.good, self.params)
        self._fill(self.part.average)

    def rewound(self, part: Part) -> None:
        self.part = part._replace(params=part.average.new_empty(0))
        self._let_go()
        self._steps.zero_()
        self._ages, self._lead = [0.0] * len(self._ages), 0


def _tangents(key: str, tangents: Any) -> dict[str, Tensor]:
    tensors = {f"{key}/{i}": t for i, t in enumerate(tangents.params)}
    return tensors | {
        f"{key}/{row}/{name}": t for row, s in tangents.state.items() for name, t in s.items()
    }
