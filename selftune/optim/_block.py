"""The joined tensors of one parameter group: weights, rule state, tangents and averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._flat import Layout
from selftune.estimators import AbstractRows
from selftune.optim._checks import check_gradient
from selftune.rules._base import InPlace, geometric
from selftune.settled import KEPT, Changes
from selftune.update import Tangents, Transition, Update

Entries = Sequence[dict[str, Any]]


class Block:
    """One parameter group's tensors as flat vectors, shown to torch as views.

    ``entries`` are the per-parameter dictionaries of ``optimizer.state``. Whatever must be
    saved lies in them as views of the flat vectors here, and is taken up from them at
    construction, so torch's own saving and loading see ordinary optimizer state. The rule's state,
    new tensors at every step, is copied there by ``sync``.

    Args:
        params: The parameters that are trained.
        names: What to call them in errors.
        entries: Their state dictionaries.
        update: Says what state there is.
        estimator: Makes and moves tangents.
        values: Hyperparameters and options of the group.
        rows: Names of the tuned hyperparameters.
        by_tensor: Whether hypergradients are kept for each tensor, or summed over them.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        entries: Entries,
        update: Update,
        estimator: AbstractRows,
        values: Mapping[str, Any],
        rows: Sequence[str],
        by_tensor: bool,
    ) -> None:
        self.params = list(params)
        self.layout = Layout(params)
        self.rows = list(rows)
        self._by_tensor = by_tensor
        self._estimator, self.discount = estimator, estimator.discount
        self._names = list(names)
        self._entries = list(entries)
        steps = [e["step"] if "step" in e else torch.zeros(()) for e in entries]
        self._steps = torch.stack([torch.as_tensor(s).float().cpu() for s in steps])
        self._ages, self._lead = self._steps.tolist(), 0
        for entry, step in zip(entries, self._steps, strict=True):
            entry["step"] = step
        weights = self.weights()
        self._before, self._grads = torch.empty_like(weights), torch.empty_like(weights)
        fresh_state = update.rule.init(weights, values)
        self._shown = {k: self._keep(k, v) for k, v in fresh_state.items()}
        self.state = {k: v.clone() for k, v in self._shown.items()}
        self._stale = False
        self._views: dict[str, list[Tensor]] = {}
        self._viewed: dict[str, Tensor] = {}  # the state of these views
        self.average = self._keep("average", weights)
        self.held = self._keep("held", weights)
        self.good = self._keep("good", weights)
        self.centre = self._keep("centre", weights)  # of where stretches began, and …
        self.mark = self._keep("mark", weights)  # … where the one under way did
        leads = "lr" in rows and estimator.closed_forms
        self.fast = self._keep("fast", weights) if leads else None
        self._pushed = [n for n in rows if n != "lr" or not leads]
        fresh = estimator.rows(len(self._pushed), weights)
        self.tangents = Tangents(self._keep("tangent", fresh.params), {})
        self.response = self._keep("response", estimator.rows(len(rows), weights).params)
        self.smooth = [n for n in rows if n in update.smooth]
        self._penalties = [rows.index(n) for n in self.smooth]
        self.changes: Changes | None = None
        if self._penalties and KEPT:
            fresh_changes = zip(("change", "last_grad", "last"), Changes.none(weights), strict=True)
            self.changes = Changes(*(self._keep(key, value) for key, value in fresh_changes))
        for row, state in update.tangent_state(self._pushed, values).items():
            for name in state:
                self._tangent_of(row, name)

    def _keep(self, key: str, fresh: Tensor) -> Tensor:
        """A flat vector whose views are the entries' ``key``, holding their present values."""
        flat = fresh.clone()
        for entry, view in zip(self._entries, self.layout.views(flat), strict=True):
            if key in entry:
                view.copy_(entry[key])
            entry[key] = view
        return flat

    def sync(self) -> None:
        """Copy the rule's state to where torch sees it; done only when someone looks."""
        if self._stale:
            for name, shown in self._shown.items():
                shown.copy_(self.state[name])
            self._stale = False

    def _tangent_of(self, row: str, name: str) -> Tensor:
        """The kept tangent of a rule's state for one hyperparameter."""
        kept = self.tangents.state.setdefault(row, {})
        if name not in kept:
            kept[name] = self._keep(f"tangent/{row}/{name}", torch.zeros_like(self.average))
        return kept[name]

    def weights(self) -> Tensor:
        """The joined weights as they are now, a copy to keep."""
        return self.layout.flatten([p.detach() for p in self.params])

    def before(self) -> Tensor:
        """The joined weights as they are now, in memory that is used again at the next step.

        Fresh memory for whole copies of a model, at every step, costs more than the arithmetic.
        """
        return self.layout.flatten(self.params, out=self._before)

    def square_distance(self, place: Tensor) -> Tensor:
        """Of the weights as they are now from others."""
        return torch.linalg.vector_norm(self.weights().sub_(place)).double().square()

    def end_stretch(self, share: float) -> None:
        """Take where the stretch began into the mean of such places; the next begins here."""
        self.centre.lerp_(self.mark, share)
        self.layout.flatten(self.params, out=self.mark)

    def gradient(self) -> tuple[Tensor, Tensor | None]:
        """The joined gradients, zeros where there are none, and a mask of who has (None: all).

        They lie in memory that is used again at the next step.
        """
        grads = [p.grad for p in self.params]
        for name, grad in zip(self._names, grads, strict=True):
            if grad is not None and grad.is_sparse:
                check_gradient(name, grad)
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return self.layout.flatten(present, out=self._grads), None
        if not present:
            zeros = self.zeros()
            return zeros, zeros.bool()
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)
        ]
        mask = self.layout.expand([float(g is not None) for g in grads])
        assert isinstance(mask, Tensor)
        return self.layout.flatten(filled), mask.bool()

    def gradients(self) -> list[Tensor] | None:
        """Gradients of all parameters as they are, if torch's fused kernels can take them."""
        if not self.layout.native:
            return None
        grads = []
        for param in self.params:
            grad = param.grad
            if grad is None or grad.is_sparse or grad.dtype != param.dtype:
                return None
            if not (grad.is_contiguous() and param.is_contiguous()):  # the state is
                return None
            grads.append(grad)
        return grads

    def step(self, kernel: InPlace, grads: list[Tensor], rate: float) -> None:
        """Let a kernel step weights and state in place."""
        if self._viewed is not self.state:
            self._views = {k: self.layout.views(v) for k, v in self.state.items()}
            self._viewed = self.state
        self._steps.add_(1)
        self._lead += 1
        kernel(self.params, grads, self._views, [e["step"] for e in self._entries], rate)
        self._stale = True

    def age(self) -> float | Tensor:
        """Updates had before, for bias corrections."""
        return self.layout.expand(self._ages) + self._lead

    def advance(
        self, transition: Transition, slopes: Mapping[str, Any] | None, mask: Tensor | None
    ) -> None:
        """Take in a step: rule state, ages and, given slopes, tangents; no parameter is written."""
        if self._pushed and slopes is not None:
            before = None if mask is None else self._copied()
            slopes = {n: slopes[n] for n in self._pushed}
            tangents = self._estimator.push(self.tangents, transition, slopes)
            for row, state in tangents.state.items():
                for name, value in state.items():
                    kept = self._tangent_of(row, name)
                    if kept is not value:
                        kept.copy_(value)
            if before is not None and mask is not None:
                self._put_back(before, ~mask)
        self.state = {name: transition.after[name] for name in self.state}
        self._stale = True
        if mask is None:
            self._steps.add_(1)
            self._lead += 1
        else:
            counted = [p.grad is not None for p in self.params]
            self._steps.add_(torch.tensor(counted))
            self._ages = [a + c for a, c in zip(self._ages, counted, strict=True)]

    def _copied(self) -> Tangents:
        state = {r: {k: v.clone() for k, v in s.items()} for r, s in self.tangents.state.items()}
        return Tangents(self.tangents.params.clone(), state)

    def _put_back(self, before: Tangents, where: Tensor) -> None:
        """Undo what a step did to the tangents of weights that took no part in it."""
        self.tangents.params.copy_(torch.where(where, before.params, self.tangents.params))
        for row, state in self.tangents.state.items():
            for name, value in state.items():
                old = before.state.get(row, {}).get(name, torch.zeros_like(value))
                value.copy_(torch.where(where, old, value))

    def blend(self, transition: Transition, share: float, mask: Tensor | None) -> None:
        """Move the averages of weights and tangents by ``share``."""
        self.average.lerp_(transition.moved, share)
        if self.fast is not None:
            self._led(self.fast, transition, share, mask)
        if self._pushed:
            self.response[-len(self._pushed) :].lerp_(self.tangents.params, share)

    def _led(self, fast: Tensor, transition: Transition, share: float, mask: Tensor | None) -> None:
        """Average the response to the rate, which is what weights moved, whatever moves them.

        With the discount γ, ``J = Σ γʲ (w_{t−j} − w_{t−j−1})`` is ``w_t − E_{t−1}``, E the weights'
        average that keeps γ of itself. Over a stride movement is discounted evenly.
        """
        stride, discount = self._estimator.stride, self._estimator.discount
        within = geometric(discount, stride) / stride
        led = torch.sub(transition.moved, fast, out=self._before)  # the step is taken in already
        self.response[0].lerp_(led.mul_(within), share)
        newer = transition.moved if mask is None else torch.where(mask, transition.moved, fast)
        fast.lerp_(newer, 1 - discount**stride)

    def signal(self, grads: Tensor, beside: Tensor | None = None) -> Tensor:
        """dL/d(raw) for an outer gradient: shape (rows, tensors), or (rows, 1) summed over them.

        Args:
            grads: The outer gradient.
            beside: What penalties are told in its place; None: the same.
        """
        told = self._told(self.response, grads)
        if beside is not None:
            told[self._penalties] = self._told(self.penalties(), beside)
        return told

    def penalties(self) -> Tensor:
        """Responses to the strengths of penalties, shape (penalties, weights)."""
        return self.response[self._penalties]

    def _told(self, response: Tensor, grads: Tensor) -> Tensor:
        if self._by_tensor:
            return self.layout.sums(self._estimator.weigh(response, grads))
        return (response @ grads).unsqueeze(1)

    def zeros(self) -> Tensor:
        """A vector of zeros in the shape of the joined weights."""
        return torch.zeros_like(self.average)

    def begin(self) -> None:
        """Take the weights as they are for all that is kept of them."""
        weights = self.weights()
        for kept in (self.average, self.held, self.good, self.centre, self.mark, self.fast):
            if kept is not None:
                kept.copy_(weights)

    def rewind(self) -> None:
        """Return to the good weights, with everything else as at a fresh start."""
        self.layout.write(self.good, self.params)
        self.average.copy_(self.good)
        self.centre.copy_(self.good)
        self.mark.copy_(self.good)
        tangents = [t for state in self.tangents.state.values() for t in state.values()]
        for flat in (self.tangents.params, self.response, *tangents):
            flat.zero_()
        if self.changes is not None:
            self.changes.forget()
        if self.fast is not None:
            self.fast.copy_(self.good)
        self.state = {k: torch.zeros_like(v) for k, v in self.state.items()}
        self._stale = True
        self._steps.zero_()
        self._ages, self._lead = [0.0] * len(self._ages), 0
