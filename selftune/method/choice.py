"""Choice of one rule from a mixture, common to all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selftune.method.displacement import Reduce
from selftune.method.sensitivities import Moment, Part
from selftune.method.step import propose
from selftune.rules import Mixture
from selftune.rules._base import Values
from selftune.rules.mixture import LEAST
from selftune.update import Transition, Update


class Chosen(NamedTuple):
    """A member that a mixture of rules has chosen.

    Attributes:
        name: Name of the rule.
        moves: Changes of raw hyperparameter values, by name.
        step: Steps taken before the choice.
        every: Weight steps between two hyperparameter steps after the choice.
    """

    name: str
    moves: Mapping[str, float]
    step: int
    every: int


def undecided(update: Update) -> Mixture | None:
    """The update's rule, if it is a mixture without a chosen member."""
    rule = update.rule
    return rule if isinstance(rule, Mixture) and rule.chosen is None else None


def decide(rule: Mixture, values: Values, squares: Tensor) -> tuple[str, dict[str, float]] | None:
    """The member with the largest weight, and its changes in log learning rate and weight decay.

    Ties go to the reference, then the first. None if a length is 0 or not finite: such a gradient
    does not determine the rate.

    Args:
        rule: The mixture.
        values: Hyperparameters and options.
        squares: Squared lengths of the directions over all weights.
    """
    name = max(rule.members, key=lambda n: (values[f"mix_{n}"], n == rule.reference))
    member, at = rule.members[name], [*rule.members].index(name)
    ratio = float(rule.scales(squares)[at])
    if not LEAST < ratio < 1 / LEAST or not bool(torch.isfinite(squares).all()):  # or NaN
        return None
    scale = math.log(ratio)
    heavy = [h.name for h in member.hparams if h.accumulates and not member.decoupled]
    kept = sum(math.log(1 - float(values[f"{name}_{n}"])) for n in heavy)
    return name, {"lr": scale, "weight_decay": kept - scale}


def announcement(rule: Mixture, values: Values, optimizer: object, step: int) -> str:
    """The choice in words, with the members' weights, and the rule as a plain optimizer."""
    total = sum(values[n] for n in rule.weights)
    shares = ", ".join(f"{n} {values[f'mix_{n}'] / total:.2f}" for n in rule.members)
    return f"step {step}: {rule.chosen} is chosen ({shares}), now {optimizer}"


def squares(
    updates: Sequence[Update],
    parts: Sequence[Part],
    grads: Sequence[Tensor],
    moments: Sequence[Moment],
    total: Reduce,
) -> Tensor:
    """Squared lengths of the members' directions over all weights, shape (members,), float64."""
    squared = []
    for update, part, grad, moment in zip(updates, parts, grads, moments, strict=True):
        rule, dtype, values = update.rule, part.average.dtype, moment.values
        assert isinstance(rule, Mixture)
        penalised = update.penalised(part.params.to(dtype), grad.to(dtype), values)
        squared.append(rule.squares(penalised, part.rule, values, moment.clock.age))
    return total(torch.stack(squared).sum(0))


def propose_all(
    updates: Sequence[Update],
    parts: Sequence[Part],
    grads: Sequence[Tensor],
    moments: Sequence[Moment],
    total: Reduce,
    *,
    sharded: bool = False,
) -> list[Transition]:
    """The steps of all parts; lengths of a mixture's directions are summed over all parts.

    A single unsharded part computes its own lengths.
    """
    if undecided(updates[0]) is not None and (len(parts) > 1 or sharded):
        squared = squares(updates, parts, grads, moments, total)
        moments = [m._replace(values={**m.values, "squares": squared}) for m in moments]
    return [propose(*step) for step in zip(updates, parts, grads, moments, strict=True)]


def taken_over(rule: Mixture, part: Part, fresh: Part) -> Part:
    """The part restarted with the chosen rule, keeping its average and the rule's state.

    All sensitivities restart. The sensitivity to the learning rate is the displacement of the
    weights, to which all members contributed until now.
    """
    state = {n: part.rule[f"{rule.chosen}/{n}"] for n in fresh.rule}
    return fresh._replace(average=part.average, rule=state)
