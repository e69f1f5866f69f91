"""The joined tensors of one parameter group, shown to torch as views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._flat import Layout
from selftune.method import Part, Sensitivities, fast_path
from selftune.method.stiff_directions import Secants
from selftune.optim._checks import check_gradient
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
        pairs: Secant pairs to keep.

    Attributes:
        part: What the method keeps; its ``params`` are empty between steps.
        good: The last good weights.
        candidate: Weights that may prove to be good.
        centre: Of the displacement.
        mark: Of the displacement.
        secants: Of stiff directions; or nothing.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        entries: Entries,
        sensitivities: Sensitivities,
        values: Mapping[str, Any],
        pairs: int,
    ) -> None:
        self.params = list(params)
        self.layout = Layout(params)
        self._names = list(names)
        self._entries = list(entries)
        steps = [e["step"] if "step" in e else torch.zeros(()) for e in entries]
        self._steps = torch.stack([torch.as_tensor(s).float().cpu() for s in steps])
        self._ages, self._lead = self._steps.tolist(), 0
        for entry, step in zip(entries, self._steps, strict=True):
            entry["step"] = step
        weights = self.weights()
        self._before, self._grads = torch.empty_like(weights), torch.empty_like(weights)
        self.part = sensitivities.begin(weights, values, tensors=len(self.params))
        self.good, self.candidate = weights.clone(), weights.clone()
        self.centre, self.mark = weights.clone(), weights.clone()
        self.secants = [Secants.begin(weights, pairs)] if pairs else []
        self._stale = False
        self._views: dict[str, list[Tensor]] = {}  # of the rule's state
        self._viewed: Mapping[str, Tensor] = {}
        known = [e["secant/changes"] for e in entries if "secant/changes" in e]
        if any(len(changes) != pairs for changes in known):  # the run has grown
            for entry in entries:
                for key in [k for k in entry if k.startswith("secant/")]:
                    del entry[key]
        for key, flat in self._kept().items():
            for entry, view in zip(self._entries, self._split(flat), strict=True):
                if key in entry:
                    view.copy_(entry[key])
                entry[key] = view
        self.part = self.part._replace(params=weights.new_empty(0))

    def _kept(self) -> dict[str, Tensor]:
        """All that is saved, by key."""
        part = self.part
        found = dict(part.rule) | {"average": part.average}
        found |= {"candidate": self.candidate, "good": self.good}
        found |= {"centre": self.centre, "mark": self.mark}
        found |= {f"sensitivity/{i}": t for i, t in enumerate(part.averaged)}
        found |= {f"recent/{i}": t for i, t in enumerate(part.recent)}
        found |= _tangents("tangent", part.tangents)
        for unit in part.decay:
            found |= {"decay": unit.averaged, **_tangents("decay", unit.tangents)}
        for secants in self.secants:
            found |= {f"secant/{name}": t for name, t in secants._asdict().items()}
        return found

    @property
    def keys(self) -> set[str]:
        """What is saved of every parameter, but for the rule's state, which follows its options."""
        return {"step", *self._kept()} - set(self.part.rule)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector, or of one value a tensor."""
        one_each = flat.ndim == 1 and len(flat) == len(self.params) != self.layout.numel
        return list(flat.unbind()) if one_each else self.layout.views(flat)

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
        return self.layout.flatten(self.params, out=self._before)

    def settle(self) -> None:
        """Let the average follow masks and frozen parameters.

        A weight that is exactly 0, as under a mask that the user applies after every step, is 0 in
        the average; a parameter that is not trained any more is there as it is.
        """
        average = self.part.average
        average.masked_fill_(self.before() == 0, 0.0)
        for param, view in zip(self.params, self.layout.views(average), strict=True):
            if not param.requires_grad:
                view.copy_(param)

    def gradient(self) -> tuple[Tensor, list[bool] | None]:
        """The joined gradients, zeros where there are none, and which there are (None: all).

        They lie in memory that is used again at the next step.
        """
        grads = [p.grad for p in self.params]
        for name, grad in zip(self._names, grads, strict=True):
            if grad is not None and grad.is_sparse:
                check_gradient(name, grad)
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return self.layout.flatten(present, out=self._grads), None
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
        self._steps.add_(1)
        self._lead += 1
        kernel(self.params, grads, self._views, [e["step"] for e in self._entries], rate)
        self._stale = True

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
            self._steps.add_(1)
            self._lead += 1
        else:
            self._steps.add_(torch.tensor(counted))
            self._ages = [a + c for a, c in zip(self._ages, counted, strict=True)]

    def begin(self) -> None:
        """Take the weights as they are for all that is kept of them."""
        weights = self.weights()
        kept = (
            *self.part.recent,
            self.part.average,
            self.candidate,
            self.good,
            self.centre,
            self.mark,
        )
        for flat in (*kept, *(s.last_params for s in self.secants)):
            flat.copy_(weights)

    def snapshot(self, kind: str) -> None:
        """Copy weights as a controller asks for it (:class:`~selftune.control.Action`)."""
        if kind == "candidate":
            self.candidate.copy_(self.part.average)
        elif kind == "promote":
            self.good.copy_(self.candidate)
        else:
            self.good.copy_(self.weights() if kind == "iterate" else self.part.average)

    def rewound(self, part: Part) -> None:
        """Go on from the good weights, with a fresh rule state."""
        self.part = part._replace(params=part.average.new_empty(0))
        self.layout.write(self.good, self.params)
        self._stale = True
        self._steps.zero_()
        self._ages, self._lead = [0.0] * len(self._ages), 0


def _tangents(key: str, tangents: Any) -> dict[str, Tensor]:
    found = {f"{key}/{i}": t for i, t in enumerate(tangents.params)}
    return found | {
        f"{key}/{row}/{name}": t for row, s in tangents.state.items() for name, t in s.items()
    }
