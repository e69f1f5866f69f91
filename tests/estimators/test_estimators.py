"""Estimators. Truths: closed forms, reverse mode through the run, finite differences."""

import pytest
import torch
from torch import Tensor

from selftune import rules
from selftune.estimators import Exact, FiniteDifference, OneStep, Rollout, Trace
from selftune.penalties import L1, L2
from selftune.update import Clock, Update

RULES = {
    "SGD": (rules.SGD(), dict(momentum=0.8, dampening=0.1, nesterov=False)),
    "Adam": (rules.Adam(), dict(beta1=0.8, beta2=0.95, eps=1e-6, amsgrad=False)),
    "AdamW": (rules.AdamW(), dict(beta1=0.8, beta2=0.95, eps=1e-6, amsgrad=False)),
    "RMSprop": (rules.RMSprop(), dict(momentum=0.5, alpha=0.9, eps=1e-6, centered=True)),
}
COMMON = dict(lr=0.03, decay=0.1, weight_decay=0.05, l1=0.02, l2=0.03)
every_rule = pytest.mark.parametrize("name", RULES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(seed: int):
    """A ridge-free least-squares loss of six weights, another batch for each seed."""
    x, y = random(12, 6, seed=seed), random(12, seed=seed + 100)
    return lambda w: (x @ w - y).square().mean()


def rollout(name: str, losses: list, penalties: tuple = (L1(), L2())) -> Rollout:
    rule, options = RULES[name]
    run = Exact().init(Rollout(Update(rule, penalties), random(6, seed=7), options))
    for loss in losses:
        run = Exact().observe(run, loss)
    return run


def hparams(name: str) -> dict[str, Tensor]:
    rule, options = RULES[name]
    values = COMMON | {h.name: options[h.name] for h in rule.hparams}
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}


@every_rule
@pytest.mark.parametrize("horizon", [1, 5, 50])
def test_exact_equals_finite_differences(name: str, horizon: int) -> None:
    run = rollout(name, [regression(s) for s in range(horizon)])
    exact = Exact().estimate(run, regression(99), hparams(name))
    differences = FiniteDifference().estimate(run, regression(99), hparams(name))
    scale = max(float(v.abs()) for v in exact.values())
    for key, value in exact.items():
        assert float(differences[key]) == pytest.approx(float(value), rel=1e-5, abs=1e-7 * scale)


def test_exact_equals_the_closed_form_of_gradient_descent() -> None:
    """L = a w²/2: w_T = (1 − ηa)ᵀ w₀, so dL_val/dη of L_val = w_T is −T a (1 − ηa)ᵀ⁻¹ w₀."""
    a, rate, steps = 1.7, 0.2, 30
    options = dict(momentum=0.0, dampening=0.0, nesterov=False, decay=0.0, weight_decay=0.0)
    start = torch.tensor([2.5], dtype=torch.float64)
    run = Rollout(
        Update(rules.SGD()), start, options, losses=[lambda w: a * (w**2).sum() / 2] * steps
    )
    got = Exact().estimate(run, lambda w: w.sum(), {"lr": torch.tensor(rate, dtype=torch.float64)})
    want = -steps * a * (1 - rate * a) ** (steps - 1) * 2.5
    assert float(got["lr"]) == pytest.approx(want, rel=1e-12)


def tracked(estimator: Trace | OneStep, name: str, losses: list) -> dict[str, Tensor]:
    """dw_T/dh of every hyperparameter as an estimator tracks it."""
    rule, options = RULES[name]
    values = {**options, **{k: float(v) for k, v in hparams(name).items()}}
    update, params = Update(rule, (L1(), L2())), random(6, seed=7)
    state, rows = rule.init(params, values), list(hparams(name))
    tangents = estimator.init(len(rows), params)
    for step, loss in enumerate(losses):
        grads = torch.func.grad(loss)(params)
        params, after, transition = update.observed(
            params, grads, state, values, Clock(step, 1.0, step)
        )
        tangents = estimator.observe(tangents, transition, dict.fromkeys(rows, 1.0))
        state = {k: after[k] for k in state}
    return dict(zip(rows, tangents.params, strict=True))


@every_rule
def test_trace_without_discount_is_exact_where_the_loss_has_no_curvature(name: str) -> None:
    """A linear loss, without penalties of its own curvature: Trace(1) equals reverse mode."""
    slopes = [random(6, seed=s) for s in range(12)]
    losses = [lambda w, s=s: (s * w).sum() for s in slopes]
    flat = {"l2": 0.0} | ({} if name == "AdamW" else {"weight_decay": 0.0})
    run = rollout(name, losses)
    at = {k: v * flat.get(k, 1.0) for k, v in hparams(name).items()}
    rule, options = RULES[name]
    values = {**options, **{k: float(v) for k, v in at.items()}}
    update, params = Update(rule, (L1(), L2())), random(6, seed=7)
    state, rows, trace = rule.init(params, values), list(at), Trace(1.0)
    tangents = trace.init(len(rows), params)
    for step, loss in enumerate(losses):
        params, after, transition = update.observed(
            params, torch.func.grad(loss)(params), state, values, Clock(step, 1.0, step)
        )
        tangents = trace.observe(tangents, transition, dict.fromkeys(rows, 1.0))
        state = {k: after[k] for k in state}
    outer = random(6, seed=50)
    exact = Exact().estimate(run, lambda w: (outer * w).sum(), at)
    for row, key in zip(tangents.params, rows, strict=True):
        if key not in flat:  # strengths of curved penalties respond through the curvature
            assert float(row @ outer) == pytest.approx(float(exact[key]), rel=1e-10, abs=1e-13)


def test_trace_equals_its_formula_for_plain_gradient_descent() -> None:
    """By hand: J_lr ← γ J_lr − u and J_λ ← γ J_λ − η w, u the whole gradient."""
    options = dict(momentum=0.0, dampening=0.0, nesterov=False, decay=0.0)
    values = dict(options, lr=0.1, weight_decay=0.3)
    update, w = Update(rules.SGD()), random(6, seed=7)
    trace = Trace(0.9)
    tangents = trace.init(2, w)
    by_hand = torch.zeros(2, 6, dtype=torch.float64)
    for step in range(10):
        grads = torch.func.grad(regression(step))(w)
        by_hand = 0.9 * by_hand - torch.stack([grads + 0.3 * w, 0.1 * w])
        state = {"momentum_buffer": torch.zeros_like(w)}
        moved, _, transition = update.observed(w, grads, state, values, Clock(step))
        tangents = trace.observe(tangents, transition, {"lr": 1.0, "weight_decay": 1.0})
        tangents = tangents._replace(state={})
        w = moved
        torch.testing.assert_close(tangents.params, by_hand, rtol=1e-12, atol=1e-14)


@every_rule
def test_one_step_is_a_trace_that_forgets(name: str) -> None:
    """Law: what a single step from fresh tangents gives, whatever went before."""
    losses = [regression(s) for s in range(6)]
    one = tracked(OneStep(), name, losses)
    none = tracked(Trace(0.0), name, losses)
    for key, value in one.items():
        torch.testing.assert_close(value, none[key], rtol=0, atol=0)
    assert any(not torch.equal(v, tracked(Trace(0.9), name, losses)[k]) for k, v in one.items())


@pytest.mark.parametrize("discount", [-0.1, 1.5])
def test_discounts_outside_zero_and_one_are_refused(discount: float) -> None:
    with pytest.raises(ValueError, match=f"discount={discount}"):
        Trace(discount)
