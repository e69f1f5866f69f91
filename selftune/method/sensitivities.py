"""Sensitivities ``J̄`` of the averaged weights to the hyperparameters, row by row.

Most sensitivities are rows of the size of the weights, which the estimator propagates through each
tracked step. Without curvature three have a closed form and need no row (:func:`closed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._trees import leaves
from selftune.estimators import AbstractRows
from selftune.method.averaging import Average, move_towards
from selftune.method.slices import WHOLE, Slice
from selftune.rules._base import AbstractRule, State, geometric
from selftune.update import Clock, Tangents, Transition, Update

DOT = 2**31 - 1  # maximum number of entries of torch.dot


class Part(NamedTuple):
    """One vector or tensor of weights with its state.

    Numbers in parentheses are sizes, relative to the weights, or to the slice if over the slice.

    Attributes:
        params: The weights (1).
        rule: The rule's state (0 to 3).
        average: The running average, at which the outer loss is measured (1).
        tangents: Sensitivities of ``params`` and ``rule`` over the slice (1 or 2 for each row).
        averaged: Sensitivities of ``average`` over the slice: the rows, then that to the learning
            rate (1 each).
        recent: E, running average of the slice with the discount of the sensitivities (1), or
            empty. The sensitivity to the learning rate is ``w − E``.
        decay: The sensitivity of a weight of 1 to a weight decay that shrinks weights
            proportionally, and its average; one per tensor, or empty.
    """

    params: Tensor
    rule: State
    average: Tensor
    tangents: Tangents
    averaged: list[Tensor]
    recent: list[Tensor]
    decay: list[UnitDecay]


class UnitDecay(NamedTuple):
    """The scalars that replace the row of weight decay, each of shape (tensors,).

    Attributes:
        tangents: The sensitivities of a weight of 1 and of its rule state.
        averaged: The running average of the weight's sensitivity.
    """

    tangents: Tangents
    averaged: Tensor


class Moment(NamedTuple):
    """Values common to all weights of a part at a step: numbers, or tensors that broadcast.

    Attributes:
        values: Hyperparameters and options.
        slopes: The derivatives of the tuned hyperparameters w.r.t. their raw values.
        clock: Time of the step.
        share: The weight of this iterate in the running averages; 0 if the step is not taken.
        mask: Which weights take part in the step, or whether any does; None: all.
        unit: The same for one weight of each tensor, if tensors differ: values, slopes, age.
    """

    values: Mapping[str, Any]
    slopes: Mapping[str, Any]
    clock: Clock
    share: Any
    mask: Tensor | None = None
    unit: Moment | None = None


def closed(names: Sequence[str], rule: AbstractRule, estimator: AbstractRows) -> set[str]:
    """Hyperparameters whose sensitivity has a closed form.

    - The log of the rate: the displacement of the weights.
    - The rate's decay α: proportional to the displacement, as α only acts through the rate.
    - A weight decay that shrinks weights: proportional to the weights.
    """
    if not estimator.closed_forms:
        return set()
    covered = {"lr", "decay"} if "lr" in names else set()
    return covered | ({"weight_decay"} if rule.shrinks else set())


class Sensitivities:
    """Tracks the average of the weights and its sensitivities.

    Args:
        names: The tuned hyperparameters of the update.
        update: The weight step.
        estimator: Propagates the rows through a step. Its stride is the number of steps between
            two tracked ones.
        averaging: The outer point, sampled at the tracked steps.
        storage: The dtype of rows; None: that of the weights, at least float32.
    """

    def __init__(
        self,
        names: Sequence[str],
        update: Update,
        estimator: AbstractRows,
        averaging: Average,
        storage: torch.dtype | None = None,
    ) -> None:
        self.update, self.estimator, self.averaging = update, estimator, averaging
        self.storage = storage
        self.names = list(names)
        self.assign()

    def assign(self) -> None:
        """Divide the hyperparameters among rows and closed forms, for the current rule."""
        names, update = self.names, self.update
        known = closed(names, update.rule, self.estimator) | update.rule.inactive
        self.rows = [n for n in names if n not in known]
        self.lr_rows = [n for n in names if n == "lr" and n in known]
        self.decay_names = [n for n in names if n == "weight_decay" and n in known]
        self.smooth = [n for n in names if n in update.smooth]

    def begin(
        self,
        params: Tensor,
        values: Mapping[str, Any],
        cut: Slice = WHOLE,
        tensors: int = 1,
        *,
        fresh: bool = False,
    ) -> Part:
        """A part at the start of a run, with zero sensitivities.

        Args:
            params: The weights, not copied.
            values: Hyperparameters and options, as numbers.
            cut: The slice whose sensitivities are kept.
            tensors: Number of concatenated tensors, if each has its own values.
            fresh: Whether the weights are a copy, which may become the average.
        """
        like = params.to(torch.promote_types(params.dtype, torch.float32))
        kept = cut.take(like)
        zeros = torch.zeros_like(kept, dtype=self.storage or like.dtype)
        decay = []
        if self.decay_names:
            unit = torch.zeros(tensors, dtype=like.dtype, device=like.device)
            decay = [UnitDecay(self._still(self.decay_names, unit, values), unit.clone())]
        state = self.update.rule.init(like, values)
        for name, tensor in state.items():
            if bool(tensor.any()):
                rule = type(self.update.rule).__name__
                raise ValueError(
                    f"rule={rule}: init returns a state {name!r} other than 0, but the sweep and "
                    "rewinds reset states to 0: keep the difference from its start instead"
                )
        return Part(
            params, state, like if fresh else like.clone(),
            self._still(self.rows, zeros, values),
            [zeros.clone() for _ in (*self.rows, *self.lr_rows)],
            [kept.clone() for _ in self.lr_rows], decay,
        )  # fmt: skip

    def _still(self, rows: Sequence[str], zeros: Tensor, values: Mapping[str, Any]) -> Tangents:
        responds = self.update.tangent_state(rows, values)
        state = {row: {k: zeros.clone() for k in sorted(ks)} for row, ks in responds.items()}
        return Tangents([zeros.clone() for _ in rows], state)

    # at a tracked step; tensors of the part are reused

    def observe(self, part: Part, transition: Transition, moment: Moment) -> None:
        """Update the sensitivities of a part by a step of its slice."""
        self._lead(part, transition.moved, moment)
        averaged = part.averaged[: len(self.rows)]
        self._push(part.tangents, averaged, self.rows, transition, moment)
        for unit in part.decay:
            self._shrink(unit, moment.unit or moment)

    def _lead(self, part: Part, moved: Tensor, moment: Moment) -> None:
        """The sensitivity to the log of the rate: the displacement.

        With the discount γ, ``J = Σ γʲ (w_{t−j} − w_{t−j−1})`` is ``w_t − E_{t−1}``, where E is
        the running average of the weights with decay γ (γᵏ over a stride of k steps).
        """
        kept = self.estimator.discount**self.estimator.stride
        for recent, row in zip(part.recent, part.averaged[len(self.rows) :], strict=True):
            move_towards(row, moved - recent, moment.share)
            mask = moment.mask
            newer = moved if mask is None else torch.where(mask, moved, recent)
            move_towards(recent, newer, 1 - kept)

    def _push(
        self,
        tangents: Tangents,
        averaged: Sequence[Tensor],
        rows: Sequence[str],
        transition: Transition,
        moment: Moment,
    ) -> None:
        """Propagate rows through the step and update their averages."""
        if not rows:
            return
        dtype, mask = transition.params.dtype, moment.mask
        kept = leaves(tangents)
        apart = mask is not None or any(t.dtype != dtype for t in kept)
        given = _copied(tangents, dtype) if apart else tangents
        slopes = {n: moment.slopes[n] for n in rows}
        after = self.estimator.push(given, transition, slopes)
        pushed = [
            *after.params, *(after.state[r][k] for r, s in tangents.state.items() for k in s)
        ]  # fmt: skip
        if mask is not None:
            pairs = zip(kept, pushed, strict=True)
            pushed = [torch.where(mask, new, old.to(dtype)) for old, new in pairs]
        for old, new in zip(kept, pushed, strict=True):
            if new is not old:
                old.copy_(new)
        for row, now in zip(averaged, pushed, strict=False):
            move_towards(row, now, moment.share)

    def _shrink(self, unit: UnitDecay, moment: Moment) -> None:
        """The weight of 1 takes a step without a gradient, and stays 1."""
        one, zeros = torch.ones_like(unit.averaged), torch.zeros_like(unit.averaged)
        state = self.update.rule.init(one, moment.values)
        transition = Transition(
            self.update, one, zeros, state, moment.values, moment.clock, zeros, zeros, {}, one
        )
        self._push(unit.tangents, [unit.averaged], self.decay_names, transition, moment)

    # at a hyperparameter step

    def penalty_sensitivity(self, part: Part, pieces: list[int] | None, cut: Slice) -> Tensor:
        """Sum of the sensitivities to the penalties' strengths, over the slice."""
        average = cut.take(part.average)
        total = torch.zeros_like(average)
        for name, row in zip(self.rows, part.averaged, strict=False):
            if name in self.smooth:
                total += row.to(total.dtype)
        for unit in part.decay if {*self.decay_names} & {*self.smooth} else []:
            total += _spread(unit.averaged, average, pieces)
        return total

    def hypergradient(
        self,
        part: Part,
        grads: Tensor,
        hparams: Mapping[str, Any],
        step: Any,
        *,
        cut: Slice = WHOLE,
        pieces: list[int] | None = None,
        by_tensor: bool = False,
        deflated: Tensor | None = None,
    ) -> Tensor:
        """dL/d(raw) of every tuned hyperparameter, shape (hyperparameters, tensors or 1).

        Args:
            part: The weights.
            grads: The outer gradient at the part's average, over the slice, times ``cut.root``.
            hparams: Current values of hyperparameters by name, for each tensor or for all.
            step: Steps taken.
            cut: The slice.
            pieces: Sizes of the concatenated tensors in the slice of the part.
            by_tensor: Whether each tensor has its own hypergradient.
            deflated: The outer gradient without stiff directions, for penalties; None: ``grads``.
        """

        def along(name: str, vector: Tensor) -> Tensor:
            outer = deflated if deflated is not None and name in self.smooth else grads
            vector = vector.to(outer.dtype)
            if by_tensor and pieces is not None:
                products = (vector * outer).split(pieces)
                return cut.rooted(torch.stack([p.sum() for p in products]))
            if vector.numel() > DOT:
                return cut.rooted((vector * outer).sum().view(1))
            return cut.rooted(torch.dot(vector.reshape(-1), outer.reshape(-1)).view(1))

        rows, average = [*self.rows, *self.lr_rows], cut.take(part.average)
        grads_of = {n: along(n, row) for n, row in zip(rows, part.averaged, strict=True)}
        stride = self.estimator.stride
        for name in self.lr_rows:  # assumes equal moves within a stride
            grads_of[name] = grads_of[name] * (geometric(self.estimator.discount, stride) / stride)
        for name, unit in zip(self.decay_names, part.decay, strict=True):
            value = unit.averaged
            if by_tensor or len(value) == 1 or bool((value == value[0]).all()):
                grads_of[name] = (value if by_tensor else value[:1]) * along(name, average)
            else:
                grads_of[name] = along(name, _spread(value, average, pieces))
        if "decay" in self.names and "decay" not in grads_of:  # d log η/d log α = −αt/(1 + αt)
            lag = self.averaging.rho / (1 - self.averaging.rho)  # of the averaged sensitivity
            time = torch.as_tensor(step, dtype=torch.float64, device=grads.device)
            shrunk = hparams["decay"] * (time - (time / 2).clamp(max=lag))
            grads_of["decay"] = (-grads_of["lr"] * shrunk / (1 + shrunk)).to(grads_of["lr"].dtype)
        if len(grads_of) < len(self.names):  # some are inactive
            grads_of = dict.fromkeys(self.names, along("", torch.zeros_like(grads))) | grads_of
        return torch.stack([grads_of[n] for n in self.names])


def rewind(part: Part, good: Tensor, cut: Slice = WHOLE) -> None:
    """Reset the average to good weights in place, and the rest to its initial state.

    The driver restores the weights.
    """
    part.average.copy_(good)
    for recent in part.recent:
        recent.copy_(cut.take(good))
    for tensor in leaves([part.rule, part.averaged, part.tangents, part.decay]):
        tensor.zero_()


def _spread(values: Tensor, average: Tensor, pieces: list[int] | None) -> Tensor:
    """``average`` times a value for each of its tensors."""
    if len(values) == 1 or pieces is None:
        return average * values[0]  # keeps shape ()
    parts = average.split(pieces)
    return torch.cat([(p * v).reshape(-1) for p, v in zip(parts, values, strict=True)])


def _copied(tangents: Tangents, dtype: torch.dtype) -> Tangents:
    return Tangents(
        [t.to(dtype, copy=True) for t in tangents.params],
        {r: {k: v.to(dtype, copy=True) for k, v in s.items()} for r, s in tangents.state.items()},
    )
