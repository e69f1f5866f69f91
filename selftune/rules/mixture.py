"""A weighted sum of rules that becomes one of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selftune.bijections import Log
from selftune.hparams import Hparam
from selftune.rules._base import AbstractRule, InPlace, State, Values
from selftune.rules.plain import PlainOptimizer
from selftune.rules.sgd import SGD

WITHIN, UNKNOWN = 0.25, 300
"""Share of a run after which one rule is chosen, and steps where its length is not known."""
PRIOR = 2.0
"""Weight of the reference at the start, where the others have 1: it is the safe choice."""
SHARPEST = 20.0
"""Largest exponent of the weights while they anneal."""
MOMENTUM = 0.9
"""SGD's momentum in a mixture, where nobody says."""
LEAST = 1e-30  # a direction of this length counts as 0
SHARED = ("lr", "weight_decay")
"""Settings that members share."""


class Mixture(AbstractRule):
    """A choice of optimizer: ``d = Σ pᵢ sᵢ dᵢ``, which anneals to a single rule.

    Each direction dᵢ is scaled by ``sᵢ = ‖d_ref‖/‖dᵢ‖`` to the length of a reference's, the first
    member that is not SGD, so that the learning rate means what it means there. Lengths are
    ``‖d‖² = Σ v d²`` over all weights, v the running mean of squared gradients that AdamW keeps:
    the empirical Fisher information, so that steps cost alike in curvature and those are preferred
    that gain most at this cost. (Without AdamW among the members, v = 1.)

    The weights are ``pᵢ = aᵢᵇ/Σ aⱼᵇ``, a softmax of b log aᵢ. Each a is a hyperparameter
    ``mix_<rule>``, 2 for the reference and 1 for the others at the start, and is tuned on
    validation with the rest, lengths held constant; ``b = 1/(1 − t/τ)`` sharpens them until step
    τ = ``mix_until``, a quarter of the run, where the rule with the largest weight is chosen. From
    there on the mixture is that rule, with its own rate η s and weight decay λ/s (SGD:
    λ (1 − μ)/s, as momentum μ adds decay up); its momentum is tuned as well.

    Members are rules whose weight decay shrinks weights in proportion; in the mixture it is
    decoupled. Their hyperparameters carry the rule's name: ``sgd_momentum``, ``adamw_beta1``.

    Args:
        rules: The members, each of another class.
        **settings: Hyperparameters and options of members, such as ``sgd_momentum=0.95``.

    Attributes:
        members: The rules by name.
        chosen: The name of the rule that was chosen; None: there is a mixture.
        inactive: Hyperparameters that do not act at present.

    Raises:
        TypeError: A member that is no rule.
        ValueError: No rule, one twice, one whose decay does not shrink weights in proportion, or
            an unknown setting.

    Source: Ozkara et al. 2024 (MADA), who mix parametrized optimizers and keep the mixture.

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
        self.defaults = {**shared, **own, **settings}
        momenta = [f"{n}_{k}" for n, m in self.members.items() for k in m.tuned
                   if k in {h.name for h in m.hparams}]  # fmt: skip
        self.tuned = ("lr", "decay", "weight_decay", *self.weights, *momenta)
        self._given = settings
        self.choose(next(iter(self.members)) if len(members) == 1 else None)

    @property
    def weights(self) -> list[str]:
        """Names of the members' weights."""
        return [f"mix_{name}" for name in self.members]

    def choose(self, name: str | None) -> None:
        """Be one of the members from now on; None: a mixture of them."""
        self.chosen = name
        one = None if name is None else self.members[name]
        self.decoupled = one is None or one.decoupled
        self.shrinks = one is None or one.shrinks
        own = [h for n in self.members for h in self.own(n).values()]
        if one is None:  # the sweep of the learning rate shortens no memory before the choice
            own = [replace(h, accumulates=True) for h in own]
        self.hparams = (*map(_weight, self.weights), *own)
        acting = {} if name is None else self.own(name)
        asleep = [h.name for h in own if h.name not in acting]
        self.inactive = frozenset(asleep if one is None else [*asleep, *self.weights])

    def fresh(self) -> Mixture:
        """A copy that has not chosen yet; of a single member it is that one."""
        other = copy.copy(self)
        other.choose(next(iter(self.members)) if len(self.members) == 1 else None)
        return other

    def fitting(self, total_steps: int | None) -> Mapping[str, float]:
        """The step of the choice, and what fits its members."""
        until = UNKNOWN if total_steps is None else max(1, int(total_steps * WITHIN))
        found: dict[str, float] = {"mix_until": until}
        for name, member in self.members.items():
            found |= {f"{name}_{k}": v for k, v in member.fitting(total_steps).items()}
        return {n: v for n, v in found.items() if n not in self._given}

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
        """The values with the exponent b of the weights at a step."""
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

    def tangent(
        self,
        grads: Tensor,
        state: State,
        values: Values,
        age: int | Tensor,
        moved: tuple[Tensor, State],
        dots: tuple[Tensor | None, State, Mapping[str, Any]],
        discount: float = 1.0,
        steps: int = 1,
    ) -> tuple[Tensor, State]:
        """``Σ pᵢ sᵢ ḋᵢ + (b ȧᵢ/aᵢ) pᵢ (sᵢ dᵢ − d)``, lengths held constant."""
        grads_dot, state_dot, values_dot = dots
        direction, after = moved
        if self.chosen is not None:
            own = self._own(self.chosen, values)
            cut = len(self.chosen) + 1
            own_dot = {n[cut:]: v for n, v in values_dot.items()}
            return self.members[self.chosen].tangent(
                grads, state, own, age, moved, (grads_dot, state_dot, own_dot), discount, steps
            )
        shares = dict(zip(self.members, self._shares(values, grads), strict=True))
        total = torch.zeros_like(grads)
        state_after: State = {}
        for name, member in self.members.items():
            slope = values_dot.get(f"mix_{name}")
            if slope is not None:
                factor = values.get("sharpness", 1.0) * slope / values[f"mix_{name}"]
                total = total + factor * shares[name] * (after[f"{name}/scaled"] - direction)
            held = _of(name, state_dot)
            if grads_dot is None and not held:
                continue
            scale = after[f"{name}/scale"]
            found, later = member.tangent(
                grads, _of(name, state), self._own(name, values), age,
                (after[f"{name}/scaled"] / scale.clamp_min(LEAST), _of(name, after)),
                (grads_dot, held, {}), discount, steps,
            )  # fmt: skip
            total = total + shares[name] * scale * found
            state_after |= {f"{name}/{k}": v for k, v in later.items()}
        return total, state_after

    # the choice

    def squares(self, grads: Tensor, state: State, values: Values, age: Any) -> Tensor:
        """Squared lengths of the members' directions over some of the weights, shape (members,)."""
        return _squares(*self._each(grads, state, values, age))

    def scales(self, squares: Tensor) -> Tensor:
        """sᵢ, from squared lengths over all weights, shape (members,)."""
        lengths = squares.sqrt()
        return lengths[[*self.members].index(self.reference)] / lengths.clamp_min(LEAST)

    def own(self, name: str) -> dict[str, Hparam]:
        """A member's hyperparameters, by the names they have here."""
        found = [
            replace(h, name=f"{name}_{h.name}", option="", index=None)
            for h in self.members[name].hparams
        ]
        return {h.name: h for h in found}

    def plain(self, values: Values) -> PlainOptimizer | None:
        """The chosen rule as a plain torch optimizer; None: none is chosen yet."""
        if self.chosen is None:
            return None
        return PlainOptimizer.of(self.members[self.chosen], self._own(self.chosen, values))

    # inside

    def _own(self, name: str, values: Values) -> dict[str, Any]:
        """The values by a member's own names."""
        own = {k: values[f"{name}_{k}"] for k in self.members[name].defaults if k not in SHARED}
        return {**values, **own}

    def _each(
        self, grads: Tensor, state: State, values: Values, age: Any
    ) -> tuple[dict[str, Tensor], State]:
        """Every member's direction, and their next states with what tangents need."""
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
    found = [torch.linalg.vector_norm(d.detach() * metric) for d in directions.values()]
    return torch.stack(found).double().square()


def _named(rules: Sequence[AbstractRule]) -> dict[str, AbstractRule]:
    """The members by name, checked."""
    found = list(rules)
    if not found:
        raise ValueError("rules=[] is empty: pass one or more, such as [SGD(), AdamW(), Lion()]")
    for rule in found:
        if not isinstance(rule, AbstractRule) or isinstance(rule, Mixture):
            raise TypeError(
                f"rules holds {rule!r}, which must be a rule of the library, such as "
                "st.rules.AdamW(): another optimizer's direction is not known before its step"
            )
        if not rule.shrinks:
            raise ValueError(
                f"rules holds {type(rule).__name__}, which rescales the gradient of weight decay, "
                "so that no decay of the others means the same: use AdamW"
            )
    names = [type(rule).__name__.lower() for rule in found]
    if len(set(names)) < len(names):
        raise ValueError(f"rules={names} holds one twice: pass each rule once")
    return dict(zip(names, found, strict=True))
