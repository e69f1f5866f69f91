"""The joined tensors of one parameter group, shown to torch as views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._flat import Layout, local, swap
from selftune.control.final_weights import between
from selftune.method import Part, Sensitivities, fast_path
from selftune.method.slices import Pieces, Slice
from selftune.method.snapshots import copy
from selftune.method.stiff_directions import Secants
from selftune.optim._checks import check_gradient
from selftune.optim._shards import Rows, whole
from selftune.rules._base import InPlace

Entries = Sequence[dict[str, Any]]


class Block:
    """One parameter group's tensors as flat vectors.

    ``entries`` are the per-parameter dictionaries of ``optimizer.state``. Whatever must be
    saved lies in them as views of the flat vectors here, and is taken up from them at
    construction, so torch's own saving and loading see ordinary optimizer state. The rule's state,
    new tensors at every step, is shown there by ``sync``.

    Args:
        params: The parameters that are trained.
        names: What to call them in errors.
        entries: Their state dictionaries.
        sensitivities: Say what is kept for them.
        values: Hyperparameters and options of the group.
        cut: The slice whose sensitivities are kept.
        pairs: Secant pairs to keep.
        snapshots: Where the last good weights are kept.

    Attributes:
        part: What the method keeps; its ``params`` are empty between steps.
        averages: The average, a view for every parameter.
        good: The last good weights.
        centre, mark: Of the displacement.
        secants: Of stiff directions; or nothing.
        sliced: Keys of what is kept of the slice alone.
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
    ) -> None:
        self.params = list(params)
        self.layout, self.cut = Layout(params), cut
        self.pieces = Pieces(cut.counts(self.layout.sizes))
        self._names = list(names)
        self._entries = list(entries)
        steps = [e["step"] if "step" in e else torch.zeros(()) for e in entries]
        self._steps = torch.stack([torch.as_tensor(s).float().cpu() for s in steps])
        self._ages, self._lead = self._steps.tolist(), 0
        for entry, step in zip(entries, self._steps, strict=True):
            entry["step"] = step
        weights = self.weights()
        self._scratch: dict[str, Tensor] = {}
        self._firsts = cut.firsts(self.layout.sizes)
        self.part = sensitivities.begin(weights, values, cut, tensors=len(params), fresh=True)
        weights = self.part.average
        self.good = copy(weights, snapshots)
        kept = cut.scaled(weights)
        self.centre, self.mark = kept.clone(), kept.clone()
        self.secants = [Secants.begin(kept, pairs)] if pairs else []
        self._stale = False
        self._views: dict[str, list[Tensor]] = {}  # of the rule's state
        self._viewed: Mapping[str, Tensor] = {}
        known = [e["secant/changes"] for e in entries if "secant/changes" in e]
        if any(len(changes) != pairs for changes in known):  # the run has grown
            for entry in entries:
                for key in [k for k in entry if k.startswith("secant/")]:
                    del entry[key]
        self.averages = self.layout.views(self.part.average)
        for key, views in self._kept().items():
            for index, (entry, view) in enumerate(zip(self._entries, views, strict=True)):
                if key in entry:
                    view.copy_(self._loaded(index, entry[key], view))
                entry[key] = view
        self.part = self.part._replace(params=weights.new_empty(0))
        self.sliced = set(self._pieces())

    def _rows(self, index: int) -> Rows:
        return Rows(self.params[index], self.cut.stride, self._firsts[index])

    def _loaded(self, index: int, value: Tensor, view: Tensor) -> Tensor:
        """This process's part of something that was saved of a parameter."""
        return local(value) if local(value).shape == view.shape else self._rows(index).load(value)

    def saved(self) -> list[dict[str, Tensor]]:
        """What is kept of each parameter, as it is saved."""
        self.sync()
        wholes = {k: self.layout.views(t) for k, t in self._wholes().items()}
        rows = [self._rows(i) for i in range(len(self.params))]
        found: list[dict[str, Tensor]] = [{} for _ in rows]
        for key, views in (wholes | self._pieces()).items():
            sliced = self.cut.stride > 1 and key in self.sliced
            for row, entry, view in zip(rows, found, views, strict=True):
                entry[key] = row.save(view) if sliced else whole(row.param, view)
        return found

    def _wholes(self) -> dict[str, Tensor]:
        """What is kept of all weights."""
        return {**self.part.rule, "average": self.part.average, "good": self.good}

    def _pieces(self) -> dict[str, list[Tensor]]:
        """What is kept of the slice, a view for every parameter."""
        part = self.part
        kept = {"centre": self.centre, "mark": self.mark}
        kept |= {f"sensitivity/{i}": t for i, t in enumerate(part.averaged)}
        kept |= {f"recent/{i}": t for i, t in enumerate(part.recent)}
        kept |= _tangents("tangent", part.tangents)
        for secants in self.secants:
            kept |= {f"secant/{name}": t for name, t in secants._asdict().items()}
        views = self.layout.views if self.cut.stride == 1 else self.pieces.views
        return {k: views(t) for k, t in kept.items()}

    def _kept(self) -> dict[str, Sequence[Tensor]]:
        """All that is saved, by key: a view for every parameter."""
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
        """What is saved of every parameter, but for the rule's state, which follows its options."""
        return {"step", *self._kept()} - set(self.part.rule)

    def sync(self) -> None:
        """Show the rule's state to torch; done only when someone looks."""
        if self._stale:
            for name, flat in self.part.rule.items():
                for entry, view in zip(self._entries, self.layout.views(flat), strict=True):
                    entry[name] = view
            self._stale = False

    def weights(self) -> Tensor:
        """The joined weights as they are now, a copy to keep."""
        return self.layout.flatten([p.detach() for p in self.params])

    def before(self) -> Tensor:
        """The joined weights as they are now, in memory that is used again at the next step.

        Fresh memory for whole copies of a model, at every step, costs more than the arithmetic.
        """
        return self.layout.flatten(self.params, out=self._kept_memory("weights"))

    def _kept_memory(self, use: str) -> Tensor:
        """A vector that is used again."""
        if use not in self._scratch:
            self._scratch[use] = self.part.average.new_empty(self.layout.numel)
        return self._scratch[use]

    def slice(self, tensors: Sequence[Tensor]) -> Tensor:
        """The slice of tensors like the parameters, as the slice of the vector of them all."""
        if self.cut.stride == 1:
            return self.layout.flatten(tensors)
        return self.joined([self.piece(i, t) for i, t in enumerate(tensors)])

    def piece(self, index: int, tensor: Tensor) -> Tensor:
        """A view of the slice of a tensor like the parameter of that number."""
        return local(tensor).detach().reshape(-1)[self._firsts[index] :: self.cut.stride]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The slice of the vector, from those of all tensors."""
        return torch.cat(list(pieces)).to(self.layout.dtype)

    def scaled(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same times the root of the slice."""
        kept = self.slice(tensors)
        return kept if self.cut.stride == 1 else kept * self.cut.root

    # other weights in place

    def copies(self) -> list[Tensor]:
        """Of the parameters as they are now."""
        return [local(p).detach().clone() for p in self.params]

    def put(self, weights: Sequence[Tensor]) -> None:
        """Write weights into the parameters."""
        torch._foreach_copy_([local(p) for p in self.params], list(weights))

    def exchange(self) -> None:
        """Swap the parameters with their average."""
        swap(self.params, self.averages)

    def show(self, place: float, weights: Sequence[Tensor]) -> None:
        """Write other weights into the parameters.

        Args:
            place: -1 the good weights, 0 the average, 1 ``weights``.
            weights: Those in place.
        """
        others = weights if place > 0 else self.layout.views(self.good)
        params = map(local, self.params)
        for param, view, other in zip(params, self.averages, others, strict=True):
            param.copy_(between(view, other, abs(place)))

    def slopes(self, index: int, grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """A parameter's ``g · Δw`` on the ways from good weights to the average, and to others.

        Args:
            index: Its number.
            grad: g.
            weights: The others, a tensor for each parameter.
        """
        average, good = self.averages[index], self.layout.views(self.good)[index]
        grad = local(grad).to(average.dtype)
        ways = average - good, weights[index] - average
        return torch.stack([(grad * way).sum() for way in ways])

    def average_towards(self, share: float) -> None:
        """Take the parameters into their average, in place."""
        torch._foreach_lerp_(self.averages, self.params, share)

    def settle(self) -> None:
        """Let the average follow masks and frozen parameters.

        A weight that is exactly 0, as under a mask that the user applies after every step, is 0 in
        the average; a parameter that is not trained any more is there as it is.
        """
        for param, view in zip(self.params, self.averages, strict=True):
            if param.requires_grad:  # a shard would not say
                view.masked_fill_(local(param) == 0, 0.0)
            else:
                view.copy_(local(param))

    def gradient(self) -> tuple[Tensor, list[bool] | None]:
        """The joined gradients, in memory that is used again, and which there are (None: all)."""
        grads = [p.grad for p in self.params]
        for name, grad in zip(self._names, grads, strict=True):
            if grad is not None and grad.is_sparse:
                check_gradient(name, grad)
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return self.layout.flatten(present, out=self._kept_memory("gradients")), None
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)
        ]
        return self.layout.flatten(filled), [g is not None for g in grads]

    def step_in_place(self, kernel: InPlace, grads: list[Tensor], rate: float) -> None:
        """Let a kernel step weights and state in place."""
        rule = self.part.rule
        if self._viewed is not rule:
            self._views = {k: self.layout.views(v) for k, v in rule.items()}
            self._viewed = rule
        self.count()
        kernel(self.params, grads, self._views, [e["step"] for e in self._entries], rate)
        self._stale = True

    def count(self) -> None:
        """Count a step that all parameters took."""
        self._steps.add_(1)
        self._lead += 1

    def plain_gradients(self) -> list[Tensor] | None:
        """Gradients of all parameters as they are, if torch's kernels can take them."""
        grads = [p.grad for p in self.params]
        if not self.layout.native or not fast_path.plain(self.params, grads):
            return None
        return [g for g in grads if g is not None]

    def ages(self) -> list[float]:
        """Updates each tensor had before, for bias corrections."""
        return [a + self._lead for a in self._ages]

    def write(self, part: Part, moved: Tensor, counted: Sequence[bool] | None) -> None:
        """Take over a part after a step, and write its weights into the parameters.

        Args:
            part: The part.
            moved: Its weights.
            counted: Which tensors took part; None: all.
        """
        self.part = part._replace(params=moved.new_empty(0))
        self._stale = True
        self.layout.write(moved, self.params)
        if counted is None:
            self.count()
        else:
            self._steps.add_(torch.tensor(counted))
            self._ages = [a + c for a, c in zip(self._ages, counted, strict=True)]

    def begin(self) -> None:
        """Take the weights as they are for all that is kept of them."""
        for flat in (self.part.average, self.good):
            self._fill(flat)
        kept, scaled = self.slice(self.params), self.scaled(self.params)
        for flat in self.part.recent:
            flat.copy_(kept)
        for flat in (self.centre, self.mark, *(s.last_params for s in self.secants)):
            flat.copy_(scaled)

    def _fill(self, flat: Tensor) -> None:
        """Copy the parameters into a vector, one after the other."""
        for param, view in zip(self.params, self.layout.views(flat), strict=True):
            view.copy_(local(param))

    def snapshot(self, kind: str) -> None:
        """Copy weights as a controller asks for it (:class:`~selftune.control.Action`)."""
        if kind == "iterate":
            self._fill(self.good)
        else:
            self.good.copy_(self.part.average)

    def go_back(self, *, start_is_good: bool) -> None:
        """Return weights and average to the last good ones.

        Args:
            start_is_good: Whether the average, which is where the run began, becomes those.
        """
        self.layout.write(self.good, self.params)
        if start_is_good:
            self.good.copy_(self.part.average)
        self._fill(self.part.average)

    def rewound(self, part: Part) -> None:
        """Go on with a fresh rule state."""
        self.part = part._replace(params=part.average.new_empty(0))
        self._stale = True
        self._steps.zero_()
        self._ages, self._lead = [0.0] * len(self._ages), 0


def _tangents(key: str, tangents: Any) -> dict[str, Tensor]:
    found = {f"{key}/{i}": t for i, t in enumerate(tangents.params)}
    return found | {
        f"{key}/{row}/{name}": t for row, s in tangents.state.items() for name, t in s.items()
    }
