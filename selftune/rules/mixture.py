"""A weighted sum of update rules from which one is selected during the run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selftune._arguments import COUNT, Instance, ListOf, Number, check
from selftune.bijections import Log
from selftune.hparams import Hparam
from selftune.rules._base import AbstractRule, Dots, Evaluation, InPlace, State, Values
from selftune.rules.plain import PlainOptimizer
from selftune.rules.sgd import SGD

log = logging.getLogger("selftune")

WITHIN, UNKNOWN = 0.25, 300
"""Fraction of the run after which a rule is chosen; steps, if its length is unknown."""
PRIOR = 2.0
"""Initial weight of the reference, the safe choice; that of the others is 1."""
SHARPEST = 20.0
"""Largest exponent of the weights while they anneal."""
MOMENTUM = 0.9
"""Default momentum of SGD in a mixture."""
LEAST = 1e-30  # a direction of this length counts as 0
SHARED = ("lr", "weight_decay")
"""Settings that members share."""


class Mixture(AbstractRule):
    """A choice of optimizer: ``d = Σ pᵢ sᵢ dᵢ``, which anneals to a single rule.

    Each direction dᵢ is scaled by ``sᵢ = ‖d_ref‖/‖dᵢ‖`` to the length of the reference direction,
    that of the first member that is not SGD, so the learning rate has the scale of that member.
    Lengths are ``‖d‖² = Σ v d²`` over all weights, where v is AdamW's running mean of squared
    gradients (the empirical Fisher information). Directions are thus compared at equal curvature
    cost, and those that reduce the loss most are preferred. (Without AdamW in the mixture, v = 1.)

    The weights are ``pᵢ = aᵢᵇ/Σ aⱼᵇ``, a softmax of b log aᵢ. Each a is a hyperparameter
    ``mix_<rule>``, initially 2 for the reference and 1 for the others, and is tuned on validation
    data with the other hyperparameters, with lengths treated as constants. ``b = 1/(1 − t/τ)``
    sharpens the weights until step τ = ``mix_until`` (by default a quarter of the run), at which
    the rule with the largest weight is chosen. From then on the mixture is that rule, with rate
    η s and weight decay λ/s (SGD: λ (1 − μ)/s, because momentum μ accumulates the decay), and its
    momentum is tuned as well.

    Members must be rules whose weight decay shrinks weights proportionally; in the mixture, weight
    decay is decoupled. Their hyperparameters are prefixed with the name of the rule:
    ``sgd_momentum``, ``adamw_beta1``.

    Args:
        rules: The members, each of a different class.
        **settings: Hyperparameters and options of members, such as ``sgd_momentum=0.95``.

    Attributes:
        members: The rules by name.
        chosen: The name of the chosen rule, or None before the choice.
        inactive: Hyperparameters that currently have no effect.

    Raises:
        TypeError: A member is not a rule.
        ValueError: No rules, a duplicate rule, a rule whose weight decay does not shrink weights
            proportionally, an unknown setting, a ``mix_until`` below 1, or a weight that is not
            above 0.

    Source: Ozkara et al. 2024 (MADA), who mix parametrised optimizers and keep the mixture.

    Examples:
        >>> import selftune as st
        >>> rule = st.rules.Mixture([st.rules.SGD(), st.rules.AdamW(), st.rules.Lion()])
        >>> rule.tuned[:6]
        ('lr', 'decay', 'weight_decay', 'mix_sgd', 'mix_adamw', 'mix_lion')
    """

    def __init__(self, rules: Sequence[AbstractRule], **settings: Any) -> None:
        self.members = members = _named(rules)
        fast = [n for n, m in members.items() if not isinstance(m, SGD)]
        self.reference = (fast or list(members))[0]
        shared = {n: members[self.reference].defaults[n] for n in SHARED}
        own = {f"{n}_{k}": v for n, m in members.items() for k, v in m.defaults.items()
               if k not in SHARED}  # fmt: skip
        if len(members) > 1 and "sgd_momentum" in own:
            own["sgd_momentum"] = MOMENTUM
        own |= {**dict.fromkeys(self.weights, 1.0), "mix_until": UNKNOWN}
        own[f"mix_{self.reference}"] = PRIOR
        for name in settings:
            if name not in own:
                raise ValueError(f"{name}={settings[name]!r} is unknown: use one of {list(own)}")
        check({"mix_until": COUNT, **dict.fromkeys(self.weights, Number(above=0))}, settings)
        self.defaults = {**shared, **own, **settings}
        momenta = [f"{n}_{k}" for n, m in self.members.items() for k in m.tuned
                   if k in {h.name for h in m.hparams}]  # fmt: skip
        self.tuned = ("lr", "decay", "weight_decay", *self.weights, *momenta)
        self.smooth = any(m.smooth for m in self.members.values())
        self._given = settings
        self.choose(next(iter(self.members)) if len(members) == 1 else None)

    @property
    def without_gradient(self) -> frozenset[str]:
        """Those of the members, prefixed."""
        return frozenset(f"{n}_{k}" for n, m in self.members.items() for k in m.without_gradient)

    @property
    def weights(self) -> list[str]:
        """Names of the mixture weights."""
        return [f"mix_{name}" for name in self.members]

    def choose(self, name: str | None) -> None:
        """Select the member ``name``; None returns to the mixture."""
        self.chosen = name
        one = None if name is None else self.members[name]
        self.decoupled = one is None or one.decoupled
        self.shrinks = one is None or one.shrinks
        own = [h for n in self.members for h in self.own(n).values()]
        if one is None:  # keeps the learning-rate sweep from shortening memories
            own = [replace(h, accumulates=True) for h in own]
        self.hparams = (*map(_weight, self.weights), *own)
        acting = {} if name is None else self.own(name)
        asleep = [h.name for h in own if h.name not in acting]
        self.inactive = frozenset(asleep if one is None else [*asleep, *self.weights])

    def fresh(self) -> Mixture:
        """A copy before the choice; with a single member, that member is already chosen."""
        other = copy.copy(self)
        other.choose(next(iter(self.members)) if len(self.members) == 1 else None)
        return other

    def fitting(self, total_steps: int | None) -> Mapping[str, float]:
        """The step of the choice, and the members' own values for a run of this length."""
        until = UNKNOWN if total_steps is None else max(1, int(total_steps * WITHIN))
        given = self._given.get("mix_until", until)
        if self.chosen is None and total_steps is not None and given > total_steps:
            log.warning(
                "mix_until=%d: the run ends after %d steps, before a rule is chosen; pass at most "
                "the number of steps, or leave mix_until out to choose at step %d",
                given, total_steps, until,
            )  # fmt: skip
        settings: dict[str, float] = {"mix_until": until}
        for name, member in self.members.items():
            settings |= {f"{name}_{k}": v for k, v in member.fitting(total_steps).items()}
        return {n: v for n, v in settings.items() if n not in self._given}

    def init(self, params: Tensor, values: Values) -> State:
        """The state of every member, or of the chosen one."""
        if self.chosen is not None:
            return self.members[self.chosen].init(params, self._own(self.chosen, values))
        return {
            f"{n}/{k}": v for n, m in self.members.items()
            for k, v in m.init(params, self._own(n, values)).items()
        }  # fmt: skip

    def in_place(self, values: Values) -> InPlace | None:
        """The chosen rule's kernel."""
        if self.chosen is None:
            return None
        return self.members[self.chosen].in_place(self._own(self.chosen, values))

    def at(self, values: Values, step: Any) -> Values:
        """The members' values, with the exponent b of the weights added as ``sharpness``."""
        for name in self.members if self.chosen is None else [self.chosen]:
            member = self.members[name]
            if type(member).at is not AbstractRule.at:
                own = member.at(self._own(name, values), step)
                values = {**values, **{f"{name}_{k}": own[k] for k in own.keys() & member.defaults}}
        if self.chosen is not None:
            return values
        left = 1 - step / values["mix_until"]
        if isinstance(left, Tensor):
            return {**values, "sharpness": 1 / left.clamp_min(1 / SHARPEST)}
        return {**values, "sharpness": 1 / max(left, 1 / SHARPEST)}

    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The weighted sum of the scaled directions."""
        if self.chosen is not None:
            own = self._own(self.chosen, values)
            return self.members[self.chosen].direction(grads, state, own, age)
        directions, after = self._each(grads, state, values, age)
        squares = values.get("squares")
        scales = self.scales(_squares(directions, after) if squares is None else squares)
        total = torch.zeros_like(grads)
        for name, share, scale in zip(
            self.members, self._shares(values, grads), scales.to(grads.dtype), strict=True
        ):
            after[f"{name}/scale"] = scale
            after[f"{name}/scaled"] = directions[name] * scale
            total = total + share * after[f"{name}/scaled"]
        return total, after

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """``Σ pᵢ sᵢ ḋᵢ + (b ȧᵢ/aᵢ) pᵢ (sᵢ dᵢ − d)``, lengths held constant."""
        grads, state, values, _, direction, after = at
        if self.chosen is not None:
            cut = len(self.chosen) + 1
            own_dot = {n[cut:]: v for n, v in dots.values.items()}
            return self.members[self.chosen].tangent(
                at._replace(values=self._own(self.chosen, values)), dots._replace(values=own_dot)
            )
        shares = dict(zip(self.members, self._shares(values, grads), strict=True))
        total = torch.zeros_like(grads)
        state_after: State = {}
        for name, member in self.members.items():
            slope = dots.values.get(f"mix_{name}")
            if slope is not None:
                factor = values.get("sharpness", 1.0) * slope / values[f"mix_{name}"]
                total = total + factor * shares[name] * (after[f"{name}/scaled"] - direction)
            state_dot = _of(name, dots.state)
            if dots.grads is None and not state_dot:
                continue
            scale = after[f"{name}/scale"]
            own = at._replace(
                state=_of(name, state),
                values=self._own(name, values),
                direction=after[f"{name}/scaled"] / scale.clamp_min(LEAST),
                after=_of(name, after),
            )
            direction_dot, later = member.tangent(own, dots._replace(state=state_dot, values={}))
            total = total + shares[name] * scale * direction_dot
            state_after |= {f"{name}/{k}": v for k, v in later.items()}
        return total, state_after

    # the choice

    def squares(self, grads: Tensor, state: State, values: Values, age: Any) -> Tensor:
        """Squared lengths of the members' directions over the given weights, shape (members,)."""
        return _squares(*self._each(grads, state, values, age))

    def scales(self, squares: Tensor) -> Tensor:
        """sᵢ, from squared lengths over all weights, shape (members,)."""
        lengths = squares.sqrt()
        return lengths[[*self.members].index(self.reference)] / lengths.clamp_min(LEAST)

    def own(self, name: str) -> dict[str, Hparam]:
        """A member's hyperparameters, by their prefixed names."""
        hparams = [
            replace(h, name=f"{name}_{h.name}", option="", index=None)
            for h in self.members[name].hparams
        ]
        return {h.name: h for h in hparams}

    def plain(self, values: Values) -> PlainOptimizer | None:
        """The chosen rule as a plain torch optimizer, or None before the choice."""
        if self.chosen is None:
            return None
        return PlainOptimizer.of(self.members[self.chosen], self._own(self.chosen, values))

    # internals

    def _own(self, name: str, values: Values) -> dict[str, Any]:
        """The values by a member's own names."""
        own = {k: values[f"{name}_{k}"] for k in self.members[name].defaults if k not in SHARED}
        return {**values, **own}

    def _each(
        self, grads: Tensor, state: State, values: Values, age: Any
    ) -> tuple[dict[str, Tensor], State]:
        """Every member's direction and next state, with intermediate values for tangents."""
        directions: State = {}
        after: State = {}
        for name, member in self.members.items():
            own = self._own(name, values)
            directions[name], later = member.direction(grads, _of(name, state), own, age)
            after |= {f"{name}/{k}": v for k, v in later.items()}
        return directions, after

    def _shares(self, values: Values, like: Tensor) -> Tensor:
        """pᵢ, shape (members, …)."""
        given = [torch.as_tensor(values[n], dtype=like.dtype, device=like.device)
                 for n in self.weights]  # fmt: skip
        return torch.softmax(torch.stack(given).log() * values.get("sharpness", 1.0), 0)


def _weight(name: str) -> Hparam:
    return Hparam(
        name=name, bijection=Log(), lower=math.exp(-8), upper=math.exp(8), from_zero=1.0,
        role="choice",
    )  # fmt: skip


def _of(name: str, state: Mapping[str, Tensor]) -> State:
    """A member's part of a state."""
    return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}/")}


def _squares(directions: Mapping[str, Tensor], after: State) -> Tensor:
    """``Σ v d²`` of each direction, or Σ d² where no member keeps the second moment v."""
    moments = [v for k, v in after.items() if k.endswith("/exp_avg_sq")]
    metric = moments[0].detach().sqrt() if moments else 1.0
    norms = [torch.linalg.vector_norm(d.detach() * metric) for d in directions.values()]
    return torch.stack(norms).double().square()


def _named(rules: Sequence[AbstractRule]) -> dict[str, AbstractRule]:
    """The members by name, checked."""
    check({"rules": ListOf(Instance((object,), "a rule"), "rules")}, {"rules": rules})
    members = list(rules)
    if not members:
        raise ValueError("rules=[] is empty: pass one or more, such as [SGD(), AdamW(), Lion()]")
    for rule in members:
        if not isinstance(rule, AbstractRule) or isinstance(rule, Mixture):
            raise TypeError(
                f"rules contains {rule!r}, which must be a rule of the library, such as "
                "st.rules.AdamW(): another optimizer's direction is not known before its step"
            )
        if not rule.elementwise:
            raise ValueError(
                f"rules contains {type(rule).__name__}, which needs whole matrices, while members "
                "of a mixture act on single weights: use it alone"
            )
        if not rule.shrinks:
            raise ValueError(
                f"rules contains {type(rule).__name__}, which rescales the gradient of its decay, "
                "so that its weight decay is not comparable to that of the others: use AdamW"
            )
    names = [type(rule).__name__.lower() for rule in members]
    if len(set(names)) < len(names):
        raise ValueError(f"rules={names} contains duplicates: pass each rule once")
    return dict(zip(names, members, strict=True))
