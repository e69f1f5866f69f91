"""A mixture of rules. Truths: its members' own steps, finite differences, lengths of directions."""

from typing import Any

import pytest
import torch
from test_rules import problem

import selftune as st
from selftune import rules
from selftune.penalties import L1
from selftune.update import Clock, Update

THREE = (rules.SGD, rules.AdamW, rules.Lion)
RANDOM = torch.Generator().manual_seed(3)
W, G, M = (torch.randn(7, generator=RANDOM, dtype=torch.float64) for _ in range(3))


def mixture(*members: type[rules.AbstractRule], **settings: Any) -> rules.Mixture:
    return rules.Mixture([member() for member in members], **settings)


def state_of(rule: rules.Mixture, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A state in the middle of a run; second moments differ from weight to weight."""
    return {k: M.square() + 0.1 if "sq" in k else M + v for k, v in rule.init(W, values).items()}


def values_of(rule: rules.Mixture, **given: Any) -> dict[str, Any]:
    return {**rule.defaults, "decay": 0.0, **given}


@pytest.mark.parametrize("member", THREE)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_single_member_takes_its_own_steps(
    member: type[rules.AbstractRule], decay: float
) -> None:
    start, loss = problem()
    alone, mixed = Update(member()), Update(mixture(member))
    given = dict(lr=0.02, weight_decay=decay, decay=0.01)
    own = {**alone.rule.defaults, **given}
    values = {**mixed.rule.defaults, **given}
    w, v = start.clone(), start.clone()
    states = alone.rule.init(w, own), mixed.rule.init(v, values)
    for step in range(20):
        clock = Clock(step, 1.0, step)
        w, after = alone(w, torch.func.grad(loss)(w), states[0], own, clock)
        v, also = mixed(v, torch.func.grad(loss)(v), states[1], values, clock)
        states = after, also
        assert torch.equal(w, v)


def test_members_move_the_weights_by_equal_lengths() -> None:
    """Of SGD and Lion, which keep no second moment: d = (SGD's ‖sign‖/‖b‖ + sign)/2."""
    rule = mixture(rules.SGD, rules.Lion)
    values = values_of(rule, mix_lion=1.0)
    state = state_of(rule, values)
    got = rule.direction(G, state, values, 3)[0]
    heavy = 0.9 * state["sgd/momentum_buffer"] + G
    sign = (0.9 * state["lion/exp_avg"] + 0.1 * G).sign()
    want = (heavy * (sign.norm() / heavy.norm()) + sign) / 2
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_lengths_are_weighted_by_the_second_moment_of_gradients() -> None:
    """Σ v d² of every scaled direction equals AdamW's, v its second moment."""
    rule = mixture(*THREE)
    values = values_of(rule)
    after = rule.direction(G, state_of(rule, values), values, 3)[1]
    costs = [(after["adamw/exp_avg_sq"] * after[f"{n}/scaled"] ** 2).sum() for n in rule.members]
    torch.testing.assert_close(torch.stack(costs), costs[1].expand(3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [0, 100])
def test_the_derivative_in_a_weight_is_a_finite_difference(step: int) -> None:
    rule = mixture(*THREE)
    values = values_of(rule, mix_sgd=1.3, mix_lion=0.6)
    state = state_of(rule, values)

    def at(**given: float) -> torch.Tensor:
        return rule.direction(G, state, rule.at({**values, **given}, step), 3)[0]

    held = rule.at(values, step)
    moved = rule.direction(G, state, held, 3)
    for name in rule.weights:
        high, low = at(**{name: values[name] + 1e-6}), at(**{name: values[name] - 1e-6})
        got = rule.tangent(
            rules.Evaluation(G, state, held, 3, *moved), rules.Dots(None, {}, {name: 0.5})
        )[0]
        torch.testing.assert_close(got, 0.5 * (high - low) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("discount", "steps"), [(1.0, 1), (0.9, 1)])
def test_tangents_of_gradient_and_state_equal_forward_mode(discount: float, steps: int) -> None:
    """With lengths held constant, as a penalty's strength is tuned."""
    rule = mixture(*THREE)
    values = values_of(rule)
    state = state_of(rule, values)
    values["squares"] = rule.squares(G, state, values, 3)
    moved = rule.direction(G, state, values, 3)
    for state_dot in ({}, {k: 0.2 * M for k in state}):
        at = rules.Evaluation(G, state, values, 3, *moved)
        dots = rules.Dots(W, state_dot, {}, discount, steps)
        want = rules.AbstractRule.tangent(rule, at, dots)
        got = rule.tangent(at, dots._replace(state={k: v.clone() for k, v in state_dot.items()}))
        torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-12)
        for name in got[1]:
            torch.testing.assert_close(got[1][name], want[1][name], rtol=1e-10, atol=1e-12)


def test_weights_anneal_to_the_largest() -> None:
    rule = mixture(*THREE)
    values = values_of(rule, mix_sgd=2.0, mix_adamw=1.0, mix_until=100)
    for step, least in ((0, 0.5), (50, 0.66), (90, 0.99)):
        held = rule.at(values, step)
        after = rule.direction(G, state_of(rule, values), held, 3)
        parts = torch.stack([after[1][f"{n}/scaled"] for n in rule.members])
        sharp = 1 / (1 - step / 100)
        shares = torch.softmax(torch.tensor([2.0, 1.0, 1.0]).double().log() * sharp, 0)
        torch.testing.assert_close(after[0], shares @ parts, rtol=1e-12, atol=0)
        assert shares[0] >= least


def test_a_penalty_goes_through_every_member() -> None:
    """Truth: the gradient of the penalised loss, given to the mixture by hand."""
    rule = mixture(*THREE)
    values = values_of(rule, l1=0.3, weight_decay=0.0)
    state, clock = state_of(rule, values), Clock(0, 1.0, 3)
    one = Update(rule, (L1(),))(W, G, state, values, clock)[0]
    other = Update(rule)(W, G + 0.3 * W.sign(), state, values, clock)[0]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("member", THREE)
def test_a_plain_optimizer_takes_the_rules_steps(member: type[rules.AbstractRule]) -> None:
    rule = member()
    momentum = {"momentum": 0.9} if member is rules.SGD else {}
    values = {**rule.defaults, "lr": 0.02, "weight_decay": 0.1, "decay": 0.0, **momentum}
    start, loss = problem()
    param = torch.nn.Parameter(start.clone())
    plain = rules.PlainOptimizer.of(rule, values).make([param])
    w, state = start.clone(), rule.init(start, values)
    for step in range(20):
        plain.zero_grad()
        loss(param).backward()
        plain.step()
        w, state = Update(rule)(w, torch.func.grad(loss)(w), state, values, Clock(step, 1.0, step))
        torch.testing.assert_close(param.detach(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("members", "settings", "error", "words"),
    [
        ([], {}, ValueError, "rules=\\[\\] is empty"),
        ([rules.AdamW(), torch.optim.LBFGS([torch.ones(1)])], {}, TypeError, "a rule of the lib"),
        ([rules.AdamW(), rules.AdamW()], {}, ValueError, "each rule once"),
        ([rules.Adam()], {}, ValueError, "use AdamW"),
        ([rules.SGD()], {"adamw_beta1": 0.5}, ValueError, "adamw_beta1=0.5 is unknown"),
        ([rules.Mixture([rules.SGD()])], {}, TypeError, "a rule of the library"),
        ([rules.SGD()], {"mix_until": 0}, ValueError, "mix_until=0 must be at least 1"),
        ([rules.SGD()], {"mix_until": 0.3}, TypeError, "mix_until=0.3 must be .* a whole number"),
        ([rules.SGD()], {"mix_until": None}, TypeError, "mix_until=None must be"),
        ([rules.SGD()], {"mix_sgd": 0.0}, ValueError, "mix_sgd=0.0 must be above 0"),
        ([rules.SGD()], {"mix_sgd": float("nan")}, ValueError, "mix_sgd=nan must be"),
    ],
)
def test_what_cannot_be_mixed_is_named(
    members: list[Any], settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rules.Mixture(members, **settings)


@pytest.mark.parametrize(("until", "warned"), [(60, 0), (61, 1)])
def test_a_choice_after_the_last_step_is_named(
    until: int, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Count: one warning if the run is too short to choose a rule."""
    mixture(rules.SGD, rules.AdamW, mix_until=until).fitting(60)
    assert sum("before a rule is chosen" in m for m in caplog.messages) == warned


class Late(rules.SGD):
    """Momentum from the fourth step on."""

    def at(self, values: Any, step: Any) -> Any:
        return {**values, "momentum": values["momentum"] * (step >= 3)}


@pytest.mark.parametrize("members", [[Late()], [Late(), rules.Lion()]])
def test_values_that_members_change_with_the_step(members: list[Any]) -> None:
    """Truth: momentum by hand (a mixture ignored them), at the last of six equal gradients."""
    param = torch.zeros(1, requires_grad=True)
    mixture = rules.Mixture(members, late_momentum=0.9, mix_late=1e9, mix_until=1)
    opt = st.Mixture([param], mixture, lr=1.0, weight_decay=0.0, tune=(), probe=False, guard=False)
    for _ in range(6):
        before = float(param.detach())
        param.grad = torch.ones(1)
        opt.step()
    moved = (before - float(param.detach())) / float(opt.param_groups[0]["applied_lr"])
    assert moved == pytest.approx(1 + 0.9 * (1 + 0.9 * (1 + 0.9)), rel=1e-4)
