"""One weight step and its derivatives: rule, penalties, learning rate and weight decay.

The step, with η = lr · rate / (1 + αt), is

    g  = ∇L + Σ λ_p ∂Ω_p(w)
    d, s₊ = direction(g, s)
    w₊ = prox(w − η (d + λ w))

where λ w appears only if the rule decouples weight decay. ``rate`` is the schedule's factor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._arguments import Instance, ListOf, check
from selftune._flat import Layout, add_to, plus
from selftune.hparams import DECAY, LR, WEIGHT_DECAY, Hparam, penalty_hparam
from selftune.penalties import L2, AbstractPenalty, Joined, ProximalL1, check_names
from selftune.rules._base import AbstractRule, Dots, Evaluation, State, Values, geometric
from selftune.schedules import inverse_time

log = logging.getLogger("selftune")


class Clock(NamedTuple):
    """The time of a step.

    Attributes:
        step: Number of previous steps, t in the learning rate's decay.
        rate: Factor of the schedule, a number or one for each weight.
        age: Number of previous updates of these weights, t in bias corrections.
    """

    step: Any
    rate: Any = 1.0
    age: Any = 0


class Point(NamedTuple):
    """The state of a run before a step, and the batch of the step.

    Attributes:
        params: The weights, shape (N,).
        state: The rule's state.
        batch: The training batch of the step.
        clock: Time of the step.
        grads: ∇L_train at params, shape (N,), without the update's penalties; None if not computed.
        options: Options of the rule at this step, if they differ from the problem's.
    """

    params: Tensor
    state: State
    batch: Any
    clock: Clock
    grads: Tensor | None = None
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Update:
    """An update rule with penalties: computes the next weights.

    Args:
        rule: Computes the direction.
        penalties: Penalties added to the loss; each names its hyperparameter.
    """

    rule: AbstractRule
    penalties: tuple[AbstractPenalty, ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments: penalties must not share names with other hyperparameters."""
        penalties = ListOf(Instance((AbstractPenalty,), "a penalty"), "penalties such as (L1(),)")
        known = Instance((AbstractRule,), "a rule such as st.rules.SGD()")
        check({"rule": known, "penalties": penalties}, vars(self))
        rule = self.rule
        own = [n for h in rule.hparams for n in (h.name, h.option)]
        taken = {LR.name, DECAY.name, *rule.defaults, *own}
        check_names(self.penalties, taken, type(rule).__name__)

    @property
    def hparams(self) -> dict[str, Hparam]:
        """Every hyperparameter of the step by name."""
        penalties = [penalty_hparam(p.name) for p in self.penalties]
        return {h.name: h for h in (LR, DECAY, *self.rule.hparams, WEIGHT_DECAY, *penalties)}

    @property
    def heavy(self) -> list[Hparam]:
        """Heavy-ball momenta that are currently active."""
        hparams = self.rule.hparams
        return [h for h in hparams if h.accumulates and h.name not in self.rule.inactive]

    @property
    def tuned(self) -> tuple[str, ...]:
        """Names tuned by default: those of the rule and all penalties."""
        return (*self.rule.tuned, *(p.name for p in self.penalties))

    @property
    def without_gradient(self) -> set[str]:
        """Hyperparameters of which the derivative of a step is zero almost everywhere."""
        added = {p.name for p in self.penalties if not p.proximal}
        return set(self.rule.without_gradient) | (set() if self.rule.smooth else added)

    def with_gradient(self, names: Sequence[str], *, given: bool) -> list[str]:
        """The names among these with respect to which a step has a derivative.

        Args:
            names: Names of hyperparameters to be tuned by gradient.
            given: Whether the user named them; otherwise those without one are left out.

        Raises:
            ValueError: A given one has a derivative of zero almost everywhere.
        """
        rule, without = type(self.rule).__name__, self.without_gradient
        for name in (n for n in names if n in without):
            if given:
                raise ValueError(
                    f"tune={name!r} would have no effect: the steps of {rule} have a derivative of "
                    "zero with respect to it. Leave it out; a population or a search can choose it"
                )
            log.warning(
                "%s: %s keeps its value, because the steps of this rule have a derivative of zero "
                "with respect to it; a population of st.Tuner or a search can choose it",
                rule, name,
            )  # fmt: skip
        return [n for n in names if n not in without]

    @property
    def regularizers(self) -> set[str]:
        """Names of the strengths of weight decay and penalties."""
        return {"weight_decay", *(p.name for p in self.penalties)}

    @property
    def _smooth_terms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Gradients ∂Ω of the terms added to the loss, by name of the strength."""
        terms: dict[str, Callable[[Tensor], Tensor]] = {}
        if not self.rule.decoupled:
            terms["weight_decay"] = L2().gradient
        return terms | {p.name: p.gradient for p in self.penalties if not p.proximal}

    @property
    def smooth(self) -> set[str]:
        """Names of the strengths of terms added to the training loss."""
        return set(self._smooth_terms)

    @property
    def _prox(self) -> list[ProximalL1]:
        return [p for p in self.penalties if isinstance(p, ProximalL1)]

    def joined(self, layout: Layout) -> Update:
        """The same update for the flat vector of ``layout``, if it needs whole tensors."""
        if self.rule.elementwise and all(p.elementwise for p in self.penalties):
            return self
        penalties = [p if p.elementwise else Joined(p.strength, p, layout) for p in self.penalties]
        return replace(self, rule=self.rule.joined(layout), penalties=tuple(penalties))

    def tangent_state(self, rows: Sequence[str], values: Values) -> dict[str, set[str]]:
        """State tensors of the rule that depend on each hyperparameter, tested on one weight."""
        weight = torch.ones(1, dtype=torch.float64, device="cpu")
        state = self.rule.init(weight, values)
        if not state:
            return {}
        numbers = {h: float(values[h]) for h in self.hparams}
        penalties = (p.penalty if isinstance(p, Joined) else p for p in self.penalties)
        single = replace(self, penalties=tuple(penalties))
        transition = single.observed(weight, weight, state, {**values, **numbers}, Clock(0))[2]
        tangents = transition.push(zero_tangents(len(rows), weight), dict.fromkeys(rows, 1.0), 0.0)
        return {row: set(names) for row, names in tangents.state.items()}

    def penalised(
        self, params: Tensor, grads: Tensor, values: Values, names: Sequence[str] | None = None
    ) -> Tensor:
        """The gradient of the loss with its penalties: ``g + Σ λ_p ∂Ω_p(w)``.

        Args:
            params: w.
            grads: g.
            values: The strengths λ by name.
            names: Names of the penalties to add; None for all.
        """
        for name, gradient in self._smooth_terms.items():
            if _on(values[name]) and (names is None or name in names):
                grads = plus(grads, gradient(params), values[name])
        return grads

    def __call__(
        self, params: Tensor, grads: Tensor, state: State, values: Values, clock: Clock
    ) -> tuple[Tensor, State]:
        """The next weights and rule state; pure and differentiable in all arguments.

        Args:
            params: The weights w.
            grads: The gradient ∇L of the loss without penalties.
            state: The rule's state.
            values: Constrained hyperparameters and the rule's options, by name.
            clock: Time of the step.
        """
        return self.observed(params, grads, state, values, clock)[:2]

    def observed(
        self, params: Tensor, grads: Tensor, state: State, values: Values, clock: Clock
    ) -> tuple[Tensor, State, Transition]:
        """The step, with its record for estimators."""
        values = self.rule.at(values, clock.step)
        grads = self.penalised(params, grads, values)
        direction, after = self.rule.direction(grads, state, values, clock.age)
        rate = learning_rate(values, clock)
        total = direction
        if self.rule.decoupled and _on(values["weight_decay"]):
            total = plus(direction, params, values["weight_decay"])
        moved = plus(params, total, -rate)
        for penalty in self._prox:
            moved = penalty.prox(moved, rate * values[penalty.name])
        transition = Transition(
            self, params, grads, state, values, clock, direction, total, after, moved
        )
        return moved, after, transition


def learning_rate(values: Values, clock: Clock) -> Any:
    """η_t = lr · rate / (1 + αt)."""
    return values["lr"] * clock.rate * inverse_time(values["decay"], clock.step)


class Tangents(NamedTuple):
    """∂(w, s)/∂z for each tuned hyperparameter.

    Attributes:
        params: Shape (hyperparameters, weights), or a list of rows.
        state: For each hyperparameter, the non-zero tangents of the rule's state.
    """

    params: Any
    state: dict[str, State]


class Transition(NamedTuple):
    """The record of one step, through which estimators propagate tangents."""

    update: Update
    params: Tensor
    grads: Tensor  # with penalties
    state: State
    values: Values
    clock: Clock
    direction: Tensor
    total: Tensor  # direction, and the decoupled decay
    after: State
    moved: Tensor

    def masked(self, mask: Tensor) -> Transition:
        """The same step, with weights outside ``mask`` unchanged."""
        return self._replace(
            grads=self.grads * mask,
            direction=self.direction * mask,
            total=self.total * mask,
            moved=torch.where(mask, self.moved, self.params),
            after=self.after
            | {k: torch.where(mask, self.after[k], v) for k, v in self.state.items()},
        )

    def push(
        self, tangents: Tangents, slopes: Mapping[str, Any], discount: float, steps: int = 1
    ) -> Tangents:
        """Tangents after the step: ``γ (∂U/∂(w,s)) J + ∂U/∂z``, without curvature.

        The gradient of the penalised loss is held constant in w, and depends only on the strengths
        of the penalties.

        Args:
            tangents: Tangents before the step; their tensors are reused for the result.
            slopes: dh/dz of each tuned hyperparameter, in the order of the tangents.
            discount: γ.
            steps: Number of identical steps to propagate through. If only every k-th step is
                tracked, it represents all k.
        """
        update, values, clock = self.update, self.values, self.clock
        rate = learning_rate(values, clock)
        keep: Any = 1.0
        if update.rule.decoupled and _on(values["weight_decay"]):
            keep = 1 - rate * values["weight_decay"]
        gain = geometric(discount * keep, steps)
        state: dict[str, State] = {}
        for row, (name, slope) in zip(tangents.params, slopes.items(), strict=True):
            row.mul_((discount * keep) ** steps)  # row by row, while it is in the cache
            if name == "lr":
                add_to(row, self.total, -gain * learning_rate({**values, "lr": slope}, clock))
            elif name == "decay":
                share = slope * clock.step / (1 + values["decay"] * clock.step)
                add_to(row, self.total, gain * rate * share)
            elif name == "weight_decay" and update.rule.decoupled:
                add_to(row, self.params, -gain * rate * slope)
            elif name not in (p.name for p in update._prox):
                before = tangents.state.get(name, {})
                dot, state[name] = self._direction_tangent(name, slope, before, discount, steps)
                add_to(row, dot, -gain * rate)
        for penalty in update._prox:
            self._push_prox(tangents.params, penalty.name, gain, slopes)
        return Tangents(tangents.params, state)

    def _direction_tangent(
        self, name: str, slope: Any, before: State, discount: float, steps: int
    ) -> tuple[Tensor, State]:
        smooth = self.update._smooth_terms
        if name in smooth:
            dots = Dots(slope * smooth[name](self.params), before, {}, discount, steps)
        else:
            dots = Dots(None, before, {name: slope}, discount, steps)
        at = Evaluation(
            self.grads, self.state, self.values, self.clock.age, self.direction, self.after
        )
        return self.update.rule.tangent(at, dots)

    def _push_prox(
        self, rows: Iterable[Tensor], name: str, gain: Any, slopes: Mapping[str, Any]
    ) -> None:
        """Soft-thresholding at η λ: zeroed weights have 0 sensitivity; others depend on η and λ."""
        sign = self.moved.sign()
        rate = gain * learning_rate(self.values, self.clock)
        for row, (other, slope) in zip(rows, slopes.items(), strict=True):
            row.mul_(sign.abs())
            if other == name:
                row.sub_(sign * (rate * slope))
            elif other == "lr":
                share = gain * learning_rate({**self.values, "lr": slope}, self.clock)
                row.sub_(sign * (share * self.values[name]))
            elif other == "decay":
                step = self.clock.step
                share = slope * step / (1 + self.values["decay"] * step)
                row.add_(sign * (rate * share * self.values[name]))


def zero_tangents(hparams: int, params: Tensor) -> Tangents:
    """Zero tangents."""
    return Tangents(params.new_zeros(hparams, params.numel()), {})


def _on(value: Any) -> bool:
    """Whether a strength has an effect: any tensor, or a number other than 0."""
    return isinstance(value, Tensor) or value != 0


__all__ = ["Clock", "Point", "Tangents", "Transition", "Update", "learning_rate", "zero_tangents"]
