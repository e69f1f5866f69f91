"""The method: a step of the weights, a step of the hyperparameters, and a rewind.

Both drivers call these functions: the optimizers eagerly on the concatenated tensors of each
parameter group, the tuner compiled into one graph with the passes of the model. The returned
state reuses the tensors of its input: do not use the old state afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.method import sensitivities as rows
from selftune.method.averaging import move_towards
from selftune.method.displacement import Displacement, Reduce
from selftune.method.hyper_optimizer import Frame, HyperOptimizer, HyperState, Propose
from selftune.method.sensitivities import Moment, Part, Sensitivities
from selftune.method.settings import MethodSettings
from selftune.method.slices import WHOLE, Slice
from selftune.method.stiff_directions import Secants, Stiffness
from selftune.update import Transition, Update

SHORTEST = 1e-18  # smaller gradient norms count as 0: their squares underflow


def local_sum(products: Tensor) -> Tensor:
    """The identity, for a process that holds all weights."""
    return products


class State(NamedTuple):
    """The state of the method, as tensors with at least one dimension.

    (torch 2.13's CPU compiler passes 0-dimensional tensors to its kernels by value, so writes to
    them are lost, see ``tests/tuner/test_compiled.py``.)

    Attributes:
        parts: The weights and their state, part by part.
        hyper: The tuned hyperparameters.
        displacement: State of the displacement limit, or empty.
        secants: Secant pairs of each part, if penalties are tuned.
        stiffness: State of the stiff directions common to all parts, or empty.
    """

    parts: list[Part]
    hyper: HyperState
    displacement: list[Displacement]
    secants: list[Secants]
    stiffness: list[Stiffness]


class Outer(NamedTuple):
    """An outer gradient at the averaged weights.

    Attributes:
        grads: Gradient over the slice of each part (:meth:`Method.cut`).
        values: Current hyperparameters of each part by name, for all of its tensors or for each.
        step: Training steps taken.
        gone: Training steps since the last outer gradient.
    """

    grads: Sequence[Tensor]
    values: Sequence[Mapping[str, Any]]
    step: Any
    gone: Any


@dataclass(kw_only=True)
class Method:
    """The method for given hyperparameters and weights.

    Args:
        sensitivities: Track the average of the weights and its sensitivities.
        hyper: Steps the hyperparameters.
        settings: Settings of the method.
        horizon: Assumed length of the run in steps.
        slices: Slice of each part with sensitivities; by default all weights.
        guarded: Whether the run has a guard. Without one, as in a game of two losses, weights may
            oscillate by design, and the displacement limit is off.
        pieces: Sizes of the concatenated tensors in the slice of each part, if each tensor has its
            own values.
        by_tensor: Whether to compute hypergradients for each tensor.
        total: Sums products with training gradients over processes that hold parts of the weights.
        outer_total: The same for outer gradients, which come from a different batch in each
            process.
    """

    sensitivities: Sensitivities
    hyper: HyperOptimizer
    settings: MethodSettings
    horizon: int
    slices: Sequence[Slice] = field(default_factory=list)
    guarded: bool = True
    pieces: Sequence[list[int]] = ()
    by_tensor: bool = False
    total: Reduce = local_sum
    outer_total: Reduce = local_sum

    def begin(self, parts: list[Part], hyper: HyperState, step: Tensor) -> State:
        """The state at the start of a run."""
        params = self.cut([p.average for p in parts])
        weights = step.new_tensor(sum(p.average.numel() for p in parts))
        slots = self.settings.stiff.slots(int(self.total(weights)))
        slots = slots if self.sensitivities.smooth else 0
        limited = self.guarded and self.settings.displacement and "lr" in self.hyper.hparams
        return State(
            parts,
            hyper,
            [Displacement.begin(params, step)] if limited else [],
            [Secants.begin(p, slots, self.sensitivities.storage) for p in params] if slots else [],
            [Stiffness.begin(slots, step.device)] if slots else [],
        )

    # the step of the weights

    def weight_step(
        self,
        state: State,
        steps: Sequence[Transition],
        moments: Sequence[Moment],
        *,
        tracked: bool,
    ) -> State:
        """The state after a step of every part.

        Args:
            state: State before the step.
            steps: Steps of the rule (:func:`propose`), or of another optimizer.
            moments: Time and hyperparameters of the steps.
            tracked: Whether the steps update averages and sensitivities.
        """
        if tracked:
            state = self.track(state, [c.of(s) for c, s in self.cuts(steps)], moments)
        parts = []
        for part, step, moment in zip(state.parts, steps, moments, strict=True):
            if tracked:
                move_towards(part.average, step.moved, moment.share)
            rule = {name: step.after[name] for name in part.rule}
            parts.append(part._replace(params=step.moved.to(part.params.dtype), rule=rule))
        return state._replace(parts=parts)

    def track(self, state: State, steps: Sequence[Transition], moments: Sequence[Moment]) -> State:
        """The state with sensitivities updated by a step.

        Args:
            state: State before the step; weights and their average do not change.
            steps: Steps of the slice of every part.
            moments: Time and hyperparameters of the steps, for all weights.
        """
        moments = [
            m if m.mask is None or m.mask.ndim == 0 else m._replace(mask=cut.take(m.mask))
            for cut, m in self.cuts(moments)
        ]
        if state.stiffness:
            state = self._secants(state, steps, moments)
        for part, step, moment in zip(state.parts, steps, moments, strict=True):
            self.sensitivities.observe(part, step, moment)
        return state

    def _secants(
        self, state: State, steps: Sequence[Transition], moments: Sequence[Moment]
    ) -> State:
        names = self.sensitivities.smooth
        pushes = [
            s.update.penalised(s.params, torch.zeros_like(s.params), s.values, names) for s in steps
        ]
        params, grads = [s.params for s in steps], [s.grads for s in steps]
        scaled = [
            [cut.rooted(t) for cut, t in self.cuts(tensors)] for tensors in (params, grads, pushes)
        ]
        stiffness = state.stiffness[0].observe(
            state.secants, scaled[0], scaled[1], [m.mask for m in moments], scaled[2],
            self.total, _taken(moments),
        )  # fmt: skip
        return state._replace(stiffness=[stiffness])

    def cut(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """The slice of every part, times its root."""
        return [cut.scaled(whole) for cut, whole in self.cuts(wholes)]

    def cuts(self, of: Sequence[Any]) -> Iterator[tuple[Slice, Any]]:
        """Pairs of each part's slice and a value for that part."""
        return zip(self.slices or [WHOLE] * len(of), of, strict=True)

    # the step of the hyperparameters

    def hypergradient(self, state: State, outer: Outer) -> tuple[State, Tensor]:
        """dL/d(raw) along an outer gradient of length 1, shape (hyperparameters, tensors or 1).

        Also returns the state with the updated time of the stiff directions.
        """
        deflated: Sequence[Tensor] | None = None
        if state.stiffness:
            summed = [
                cut.rooted(self.sensitivities.penalty_sensitivity(p, self._pieces(i), cut))
                for i, (cut, p) in enumerate(self.cuts(state.parts))
            ]
            memories = outer.gone * (1 - self.sensitivities.estimator.discount)
            deflated, stiffness = state.stiffness[0].deflated(
                outer.grads, state.secants, summed, memories,
                self.settings.stiff.dependent, self.total,
            )  # fmt: skip
            state = state._replace(stiffness=[stiffness])
        signal = self.outer_total(self.along(state, outer, deflated))
        return state, self.unit(signal, outer.grads, self.outer_total)

    def along(self, state: State, outer: Outer, deflated: Sequence[Tensor] | None = None) -> Tensor:
        """Hypergradients along an unnormalised gradient."""
        products = [
            self.sensitivities.hypergradient(
                part, grads, values, outer.step,
                cut=cut, pieces=self._pieces(i), by_tensor=self.by_tensor,
                deflated=None if deflated is None else deflated[i],
            )
            for i, ((cut, part), grads, values) in enumerate(
                zip(self.cuts(state.parts), outer.grads, outer.values, strict=True)
            )
        ]  # fmt: skip
        return torch.cat(products, dim=1) if self.by_tensor else torch.stack(products).sum(0)

    def unit(self, signal: Tensor, grads: Sequence[Tensor], reduce: Reduce) -> Tensor:
        """Normalised hypergradients, from reduced ones along an unnormalised gradient."""
        if not self.settings.unit_gradient:
            return signal
        squares = [torch.linalg.vector_norm(g).double().square() for g in grads]
        length = reduce(torch.stack(squares).sum().view(1)).sqrt()
        return signal / length.clamp_min(SHORTEST)

    def hyper_step(
        self,
        state: State,
        signal: Tensor,
        weights: Sequence[Tensor],
        frame: Frame,
        step: Tensor,
        *,
        memory: Any = 1.0,
        steps: int = 0,
        moving: Sequence[str] | None = None,
        propose: Propose | None = None,
    ) -> tuple[State, Tensor | None]:
        """The state after a hyperparameter step, and S² if the displacement limit is on.

        Args:
            state: State before the step.
            signal: dL/d(raw), shape (shifts,).
            weights: Current weights of the slice of every part (:meth:`cut`).
            frame: Bounds of the shifts.
            step: Training steps taken, shape (1,).
            memory: 1/(1 − μ) of heavy-ball momentum.
            steps: Training steps taken, as a number, for the floor if the horizon is unknown.
            moving: Names that may change; None: all.
            propose: An optimizer of the shifts instead of Adam.
        """
        lr_increase_scale: Any = 1.0
        square = None
        limit = self.settings.displacement
        if state.displacement and limit is not None and (moving is None or "lr" in moving):
            displacement = state.displacement[0].update(weights, step, limit, self.total)
            square = displacement.square(weights, self.total)
            lr_increase_scale = limit.climb(square)
            free = step < self.horizon * limit.free_share
            lr_increase_scale = torch.where(free, 1.0, lr_increase_scale)
            state = state._replace(displacement=[displacement])
        hyper = self.hyper.step(
            state.hyper, signal.to(state.hyper.raw.device), frame,
            memory=memory, lr_increase_scale=lr_increase_scale, steps=steps, moving=moving,
            propose=propose,
        )  # fmt: skip
        return state._replace(hyper=hyper), square

    def ratio(self, state: State, weights: Sequence[Tensor]) -> float:
        """The displacement ratio S at the full weights; NaN if unknown."""
        if not state.displacement:
            return float("nan")
        return float(state.displacement[0].square(self.cut(weights), self.total).sqrt())

    # the rewind

    def rewind(self, state: State, good: Sequence[Tensor], step: Any) -> State:
        """Reset averages to good weights, and sensitivities, rule state and Adam's moments to 0.

        The driver restores the weights.
        """
        for (cut, part), weights in zip(self.cuts(state.parts), good, strict=True):
            rows.rewind(part, weights, cut)
        for secants in state.secants:
            secants.forget()
        return state._replace(
            hyper=state.hyper.forget(),
            displacement=[
                d.rewound(self.cut([p.average for p in state.parts]), step)
                for d in state.displacement
            ],
            stiffness=[s.rewound() for s in state.stiffness],
        )

    def _pieces(self, index: int) -> list[int] | None:
        return self.pieces[index] if self.pieces else None


def _taken(moments: Sequence[Moment]) -> Tensor | None:
    """Whether any part takes the step; None if all do."""
    masks = [m.mask for m in moments if m.mask is not None and m.mask.ndim == 0]
    return torch.stack(masks).any() if len(masks) == len(moments) else None


def propose(update: Update, part: Part, grads: Tensor, moment: Moment) -> Transition:
    """The step of a part by the update's rule (pure); weights outside the mask do not change."""
    dtype = part.average.dtype
    step = update.observed(
        part.params.to(dtype), grads.to(dtype), part.rule, moment.values, moment.clock
    )[2]
    return step if moment.mask is None else step.masked(moment.mask)
