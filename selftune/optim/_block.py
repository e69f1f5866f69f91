"""The joined tensors of one parameter group: weights, rule state, tangents and averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._flat import Layout
from selftune.estimators import AbstractEstimator
from selftune.update import Clock, Tangents, Update


class Block:
    """One parameter group's tensors as flat vectors, shown to torch as views.

    ``entries`` are the per-parameter dictionaries of ``optimizer.state``. Whatever must be
    saved lies in them as views of the flat vectors here, and is taken up from them at
    construction, so torch's own saving and loading see ordinary optimizer state.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        entries: Sequence[dict[str, Any]],
        update: Update,
        estimator: AbstractEstimator,
        values: Mapping[str, Any],
        rows: Sequence[str],
    ) -> None:
        """Join ``params`` and take up whatever ``entries`` hold already."""
        self.params = list(params)
        self.layout = Layout(params)
        self.update = update
        self.estimator = estimator
        self.rows = list(rows)
        self._entries = list(entries)
        weights = self.layout.flatten([p.detach() for p in params])
        steps = [e["step"] if "step" in e else torch.zeros(()) for e in entries]
        self.steps = torch.stack([s.float().cpu() for s in steps])
        self.ages = [int(s) for s in self.steps]
        for entry, step in zip(entries, self.steps, strict=True):
            entry["step"] = step
        self.average = self._keep("average", weights)
        self.good = self._keep("good", weights)
        self.state = {k: self._keep(k, v) for k, v in update.rule.init(weights, values).items()}
        fresh = estimator.init(len(rows), weights)
        self.tangents = Tangents(self._keep("tangent", fresh.params), {})
        self.response = self._keep("response", torch.zeros_like(fresh.params))
        for row in rows:
            marks = [k for k in self.state if any(f"tangent/{row}/{k}" in e for e in entries)]
            if marks:
                self.tangents.state[row] = {
                    k: self._keep(f"tangent/{row}/{k}", torch.zeros_like(weights)) for k in marks
                }

    def _keep(self, key: str, fresh: Tensor) -> Tensor:
        """A flat vector whose views are the entries' ``key``, holding their present values."""
        flat = fresh.clone()
        for entry, view in zip(self._entries, self.layout.views(flat), strict=True):
            if key in entry:
                view.copy_(entry[key])
            entry[key] = view
        return flat

    @property
    def touched(self) -> bool:
        """Whether someone replaced the tensors that torch sees (load_state_dict does)."""
        return self._entries[0].get("average") is None or (
            self._entries[0]["average"].data_ptr() != self.average.data_ptr()
        )

    def gradient(self) -> tuple[Tensor | None, Tensor | None]:
        """The joined gradients, and a mask of the weights that have one (None: all).

        None in place of the gradients means that no parameter has one.
        """
        grads = [p.grad for p in self.params]
        if all(g is not None for g in grads):
            return self.layout.flatten(grads), None  # type: ignore[arg-type]
        if all(g is None for g in grads):
            return None, None
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)
        ]
        mask = torch.tensor([g is not None for g in grads], device=self.layout.device)
        sizes = torch.tensor(self.layout.sizes, device=self.layout.device)
        return self.layout.flatten(filled), mask.repeat_interleave(sizes)

    def weights(self) -> Tensor:
        """The joined weights as they are now."""
        return self.layout.flatten([p.detach() for p in self.params])

    def age(self) -> int | Tensor:
        """Updates had before, for bias corrections."""
        age = self.layout.expand([float(a) for a in self.ages])
        return age if isinstance(age, Tensor) else int(age)

    def advance(
        self,
        grads: Tensor,
        mask: Tensor | None,
        values: Mapping[str, Any],
        slopes: Mapping[str, Any],
        step: int,
        rate: float,
    ) -> Tensor:
        """One weight step with its tangents; returns the new weights without writing them."""
        before = self.weights()
        clock = Clock(step, rate, self.age())
        moved, after, transition = self.update.observed(before, grads, self.state, values, clock)
        if mask is not None:
            moved = torch.where(mask, moved, before)
            after = {k: torch.where(mask, v, self.state[k]) for k, v in after.items()}
            transition = transition._replace(
                total=transition.total * mask, direction=transition.direction * mask
            )
        if self.rows:
            tangents = self.estimator.observe(self.tangents, transition, slopes)
            self._hold(tangents)
        for name, value in after.items():
            self.state[name].copy_(value)
        counted = [p.grad is not None for p in self.params]
        self.ages = [a + c for a, c in zip(self.ages, counted, strict=True)]
        if mask is None:
            self.steps.add_(1)
        else:
            self.steps.add_(torch.tensor(counted, dtype=torch.float32))
        return moved

    def _hold(self, tangents: Tangents) -> None:
        """Keep tangents of the rule's state where torch sees them."""
        for row, state in tangents.state.items():
            kept = self.tangents.state.setdefault(row, {})
            for name, value in state.items():
                if name not in kept:
                    kept[name] = self._keep(f"tangent/{row}/{name}", torch.zeros_like(value))
                if kept[name] is not value:
                    kept[name].copy_(value)

    def blend(self, weights: Tensor, share: float) -> None:
        """Move the averages of weights and tangents toward the newest by ``share``."""
        self.average.lerp_(weights, share)
        if self.rows:
            self.response.lerp_(self.tangents.params, share)

    def forget(self) -> None:
        """Reset tangents, the rule's state and the average to those of a fresh start."""
        for flat in (self.tangents.params, self.response, *self.state.values()):
            flat.zero_()
        for state in self.tangents.state.values():
            for flat in state.values():
                flat.zero_()
        self.steps.zero_()
        self.ages = [0] * len(self.ages)

    def signal(self, grads: Tensor, by_tensor: bool) -> Tensor:
        """Hypergradients summed over each tensor, shape (rows, tensors), or over all, (rows, 1)."""
        if not by_tensor:
            return (self.response @ grads).unsqueeze(1)
        return self.layout.sums(self.estimator.estimate(self.response, grads))
