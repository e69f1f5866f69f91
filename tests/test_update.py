"""The weight step and its tangents. Truths: the step by hand, and torch.func.jacfwd of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from selftune import rules
from selftune._flat import Layout
from selftune.bijections import Log
from selftune.penalties import L1, L2, Group, ProximalL1
from selftune.update import Clock, Tangents, Transition, Update, learning_rate, zero_tangents

N = 12
OPTIONS = dict(dampening=0.1, nesterov=False, eps=1e-6, amsgrad=False, centered=False)
VALUES: dict[str, Any] = OPTIONS | dict(
    lr=0.1, decay=0.2, weight_decay=0.05, momentum=0.7, beta1=0.8, beta2=0.95, alpha=0.9,
    l1=3.0, l2=0.3,
)  # fmt: skip
CLOCK = Clock(step=3, rate=0.5, age=4)
RULES = ["SGD", "Nesterov", "Adam", "AMSGrad", "AdamW", "RMSprop", "Lion"]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(kind: str, penalties: tuple, per_weight: bool = False) -> tuple[Update, tuple, dict]:
    """An update, the arguments of a step from a random state, and random slopes."""
    rule = getattr(rules, {"Nesterov": "SGD", "AMSGrad": "Adam"}.get(kind, kind))()
    update = Update(rule, penalties)
    values = VALUES | dict(nesterov=kind == "Nesterov", amsgrad=kind == "AMSGrad")
    slopes: dict[str, Any] = {}
    for i, name in enumerate(update.hparams):
        slopes[name] = 0.3 + 0.1 * i
        if per_weight:
            values[name] = values[name] * (1 - 0.2 * random(50 + i, N).sigmoid())
            slopes[name] = slopes[name] * random(60 + i, N)
    w, g = random(0, N), random(1, N)
    w[: N // 2] *= 0.01  # near the kink of a prox
    state = {k: random(9, N).square() + v + 0.5 for k, v in rule.init(w, values).items()}
    return update, (w, g, state, values, CLOCK), slopes


def jacfwd_twin(
    update: Update, step: tuple, name: str, slope: Any, dots: Tangents, row: int
) -> Any:
    """d(w₊, s₊)/dz with the penalised gradient's own dependence on w left out."""
    w, g, state, values, clock = step
    bare = replace(update, penalties=tuple(p for p in update.penalties if p.proximal))
    off = {} if update.rule.decoupled else {"weight_decay": 0.0}

    def end(z: Tensor) -> Any:
        moving = values | {name: values[name] + z * slope}
        held = update.penalised(w, g, moving)
        state_dots = dots.state.get(name, {})
        at = {k: v + z * state_dots.get(k, torch.zeros_like(v)) for k, v in state.items()}
        return bare(w + z * dots.params[row], held, at, moving | off, clock)

    return torch.func.jacfwd(end)(torch.zeros((), dtype=torch.float64))


def random_tangents(transition: Transition, slopes: dict) -> Tangents:
    """Random tangents of those states that respond at all."""
    w = transition.params
    first = transition.push(zero_tangents(len(slopes), w), slopes, 1.0)
    state = {
        row: {k: random(30 + i, N) for i, k in enumerate(entry)}
        for row, entry in first.state.items()
    }
    return Tangents(random(20, len(slopes), N), state)


def copied(t: Tangents) -> Tangents:
    state = {row: {k: v.clone() for k, v in entry.items()} for row, entry in t.state.items()}
    return Tangents(t.params.clone(), state)


@pytest.mark.parametrize("discount", [1.0, 0.0])
@pytest.mark.parametrize("per_weight", [False, True])
@pytest.mark.parametrize("penalties", [(L1(), L2()), (ProximalL1(), L2())], ids=["smooth", "prox"])
@pytest.mark.parametrize("kind", RULES)
def test_push_equals_jacfwd(kind: str, penalties: tuple, per_weight: bool, discount: float) -> None:
    """Every row, from random tangents (γ = 1), and of the last step alone (γ = 0)."""
    update, step, slopes = case(kind, penalties, per_weight)
    moved, _, transition = update.observed(*step)
    assert (moved == 0).any() == penalties[0].proximal  # the prox must meet both its branches
    tangents = random_tangents(transition, slopes)
    pushed = transition.push(copied(tangents), slopes, discount)
    start = tangents if discount else zero_tangents(len(slopes), step[0])
    for row, (name, slope) in enumerate(slopes.items()):
        moved_dot, after_dot = jacfwd_twin(update, step, name, slope, start, row)
        torch.testing.assert_close(pushed.params[row], moved_dot, rtol=1e-10, atol=1e-13)
        kept = {k: after_dot[k] for k in step[2]}
        for key, want in kept.items() if kind != "Lion" else ():  # a sign forgets its state
            got = pushed.state.get(name, {}).get(key, torch.zeros_like(want))
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_discount_scales_only_the_past(kind: str) -> None:
    """Law: push is affine in γ, so γ = ½ lies midway between γ = 0 and γ = 1."""
    update, step, slopes = case(kind, (ProximalL1(), L2()))
    transition = update.observed(*step)[2]
    tangents = random_tangents(transition, slopes)
    none, half, full = (transition.push(copied(tangents), slopes, d) for d in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half.params, (none.params + full.params) / 2)


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_step_by_hand(decoupled: bool, proximal: bool) -> None:
    """Truth: w₊ = prox(w − η (d + λ w)) written out for heavy-ball SGD and for Lion."""
    kind, penalty = ("Lion" if decoupled else "SGD"), (ProximalL1() if proximal else L1())
    update, (w, g, state, values, clock), _ = case(kind, (penalty, L2()))
    rate = 0.1 * 0.5 / (1 + 0.2 * 3)
    assert learning_rate(values, clock) == pytest.approx(rate, rel=1e-14)
    full = g + 0.3 * w + (0 if proximal else 3 * w.sign()) + (0 if decoupled else 0.05 * w)
    if decoupled:
        m = state["exp_avg"]
        direction, memory = (0.8 * m + 0.2 * full).sign(), 0.95 * m + 0.05 * full
    else:
        direction = memory = 0.7 * state["momentum_buffer"] + 0.9 * full
    want = w - rate * (direction + (0.05 * w if decoupled else 0))
    if proximal:
        want = want.sign() * (want.abs() - rate * 3).clamp_min(0)
    got, after = update(w, g, state, values, clock)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(next(iter(after.values())), memory, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", RULES)
def test_masked_weights_and_their_state_stay(kind: str) -> None:
    """Law: outside the mask bit for bit as before, inside as without a mask."""
    update, step, _ = case(kind, (L2(),))
    _, _, transition = update.observed(*step)
    mask = random(40, N) > 0
    masked = transition.masked(mask)
    assert (transition.moved != step[0]).all()
    pairs = [(masked.moved, transition.moved, step[0])]
    pairs += [(masked.after[k], transition.after[k], step[2][k]) for k in step[2]]
    for got, inside, outside in pairs:
        assert torch.equal(got, torch.where(mask, inside, outside))


def test_names_of_what_can_be_tuned() -> None:
    """Law: penalties bring their strength along, and no name may stand for two of them."""
    update = Update(rules.AdamW(), (L1(), Group()))
    names = ["lr", "decay", "beta1", "beta2", "weight_decay", "l1", "group"]
    assert list(update.hparams) == names
    assert all(isinstance(update.hparams[n].bijection, Log) for n in ("l1", "group"))
    assert update.regularizers == {"weight_decay", "l1", "group"}
    with pytest.raises(ValueError, match="share a name"):
        Update(rules.SGD(), (L1(), ProximalL1()))


def test_penalties_of_whole_tensors_are_tried_on_one_weight() -> None:
    """Law: which states respond does not depend on how tensors are joined."""
    update, (_, _, _, values, _), _ = case("AdamW", (Group(),))
    values["group"] = 0.1
    joined = update.joined(Layout([random(0, 3, 2), random(1, 5)]))
    rows = ["lr", "group"]
    assert joined.tangent_state(rows, values) == update.tangent_state(rows, values)
