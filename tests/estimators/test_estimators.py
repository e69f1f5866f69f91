"""Each estimator for itself. Truths: closed forms, hand-derived formulas, the exact one, laws."""

import math

import pytest
import torch
from problems import data, number, random, regression, square
from torch import Tensor, nn

import selftune as st
from selftune.estimators import Exact, FiniteDifference, hypergradient
from selftune.penalties import L1, L2
from selftune.problem import Problem
from selftune.update import Clock, Update, zero_tangents

RULES = {
    "SGD": (st.rules.SGD(), dict(momentum=0.8, dampening=0.1)),
    "Adam": (st.rules.Adam(), dict(beta1=0.8, beta2=0.95, eps=1e-6)),
    "AdamW": (st.rules.AdamW(), dict(beta1=0.8, beta2=0.95, eps=1e-6)),
    "RMSprop": (st.rules.RMSprop(), dict(momentum=0.5, alpha=0.9, eps=1e-6, centered=True)),
    "Lion": (st.rules.Lion(), dict(beta1=0.8, beta2=0.95)),
}
COMMON = dict(lr=0.03, decay=0.1, weight_decay=0.05, l1=0.02, l2=0.03)
every_rule = pytest.mark.parametrize("name", RULES)


def problem_of(name: str, **options: object) -> tuple[Problem, dict[str, Tensor]]:
    """Least squares under a rule with penalties, and all of its hyperparameters."""
    rule, given = RULES[name]
    values = COMMON | {h.name: given[h.name] for h in rule.hparams}
    problem = Problem(
        update=Update(rule, (L1(), L2())), inner_loss=square,
        outer_loss=lambda w, b: square(w, {}, b), options={**given, **options},
    )  # fmt: skip
    return problem, {k: number(float(v)) for k, v in values.items()}


# exact ones


def test_exact_equals_the_closed_form_of_gradient_descent() -> None:
    """L = a w²/2: w_T = (1 − ηa)ᵀ w₀, so dL_val/dη of L_val = w_T is −T a (1 − ηa)ᵀ⁻¹ w₀."""
    a, rate, steps = 1.7, 0.2, 30
    problem = Problem(
        update=Update(st.rules.SGD()), inner_loss=lambda w, h, b: a * (w**2).sum() / 2,
        outer_loss=lambda w, b: w.sum(),
    )  # fmt: skip
    start = torch.tensor([2.5], dtype=torch.float64)
    want = -steps * a * (1 - rate * a) ** (steps - 1) * 2.5
    for estimator in (Exact(), st.Forward(), st.Unrolled()):
        args = (start, {"lr": number(rate)}, [None] * steps, None)
        got = hypergradient(problem, estimator, *args).grads
        assert float(got["lr"]) == pytest.approx(want, rel=1e-12)


# those that drop the curvature


@every_rule
@pytest.mark.parametrize("estimator", [st.Trace(0.9), st.Trace(1.0), st.OneStep()], ids=str)
def test_rows_by_hand_equal_the_differentiated_update(name: str, estimator: st.Trace) -> None:
    """The rules' hand-derived tangents, and autograd through the update with H left out."""
    problem, hparams = problem_of(name)
    # By hand the curvature of penalties is dropped with the loss's: with none there is none.
    hparams["l2"] = number(0.0)
    if not problem.update.rule.decoupled:
        hparams["weight_decay"] = number(0.0)
    rows = list(hparams)
    point = problem.start(random(6, seed=7), hparams)
    memory = estimator.init(problem, point, hparams)
    tangents = zero_tangents(len(rows), point.params)
    for s in range(8):
        point = point._replace(batch=data(s))
        memory = estimator.observe(problem, memory, point, hparams)
        transition = problem.update.observed(
            point.params, problem.gradient(point, hparams), point.state, problem.values(hparams),
            point.clock,
        )[2]  # fmt: skip
        tangents = estimator.push(tangents, transition, dict.fromkeys(rows, 1.0))
        point = problem.step(point, hparams)
    torch.testing.assert_close(tangents.params, memory.params, rtol=1e-9, atol=1e-14)
    assert bool(memory.params[0].any())


@every_rule
def test_trace_without_discount_is_exact_where_nothing_is_curved(name: str) -> None:
    """A linear loss with L1 alone: Trace(1), by both ways, equals autograd through the run."""
    rule, given = RULES[name]
    problem = Problem(
        update=Update(rule, (L1(),)), inner_loss=lambda w, h, b: b @ w,
        outer_loss=lambda w, b: b @ w, options=given,
    )  # fmt: skip
    hparams = problem_of(name)[1]
    del hparams["l2"]
    if not rule.decoupled:
        del hparams["weight_decay"]
    batches, outer = [random(6, seed=s) for s in range(12)], random(6, seed=50)
    args = (random(6, seed=7), hparams, batches, outer)
    truth = hypergradient(problem, Exact(), *args).grads
    found = hypergradient(problem, st.Trace(1.0), *args).grads
    rows, trace = list(hparams), st.Trace(1.0)
    tangents = zero_tangents(len(rows), random(6))
    point = problem.start(random(6, seed=7), hparams)
    for batch in batches:
        point = point._replace(batch=batch)
        transition = problem.update.observed(
            point.params, batch, point.state, problem.values(hparams), point.clock
        )[2]
        tangents = trace.push(tangents, transition, dict.fromkeys(rows, 1.0))
        point = problem.step(point, hparams)
    for i, row in enumerate(rows):
        want = float(truth[row])
        assert float(found[row]) == pytest.approx(want, rel=1e-10, abs=1e-13)
        assert float(tangents.params[i] @ outer) == pytest.approx(want, rel=1e-10, abs=1e-13)


def test_trace_equals_its_formula_for_plain_gradient_descent() -> None:
    """By hand: J_lr ← γ J_lr − u and J_λ ← γ J_λ − η w, u the whole gradient."""
    values = dict(momentum=0.0, dampening=0.0, nesterov=False, decay=0.0, lr=0.1, weight_decay=0.3)
    update, w = Update(st.rules.SGD()), random(6, seed=7)
    trace = st.Trace(0.9)
    tangents = zero_tangents(2, w)
    by_hand = torch.zeros(2, 6, dtype=torch.float64)
    for step in range(10):
        grads = torch.func.grad(square)(w, {}, data(step))
        by_hand = 0.9 * by_hand - torch.stack([grads + 0.3 * w, 0.1 * w])
        state = {"momentum_buffer": torch.zeros_like(w)}
        moved, _, transition = update.observed(w, grads, state, values, Clock(step))
        tangents = trace.push(tangents, transition, {"lr": 1.0, "weight_decay": 1.0})
        tangents = tangents._replace(state={})
        w = moved
        torch.testing.assert_close(tangents.params, by_hand, rtol=1e-12, atol=1e-14)


@every_rule
def test_one_step_is_the_exact_answer_for_the_last_step(name: str) -> None:
    """Law: a run of one step from where the others led, its state held fixed."""
    problem, hparams = problem_of(name)
    point = problem.run(random(6, seed=7), hparams, [data(s) for s in range(5)])
    point = point._replace(batch=data(5))
    one = st.OneStep()
    memory = one.init(problem, point, hparams)
    memory = one.observe(problem, memory, point, hparams)
    grads = random(6, seed=30)
    found = one.estimate(problem, memory, problem.step(point, hparams), hparams, grads).grads
    truth = torch.func.grad(lambda h: problem.step(point, h).params @ grads)(hparams)
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-14)


# forward mode


def test_gauss_newton_is_exact_for_least_squares() -> None:
    """Law: with a linear model and a square loss the Hessian is the Gauss-Newton matrix."""
    net, shape = nn.Linear(4, 3).double(), nn.functional.mse_loss
    problem, weights = st.as_problem(net, shape, Update(st.rules.SGD()), options={"momentum": 0.5})
    batches = [(random(8, 4, seed=s), random(8, 3, seed=s + 50)) for s in range(5)]
    args = (weights, {"lr": number(0.1), "weight_decay": number(0.1)}, batches, batches[0])
    truth = hypergradient(problem, st.Forward(), *args).grads
    found = hypergradient(problem, st.Forward(curvature="gauss-newton"), *args).grads
    for n, t in truth.items():
        assert float(found[n]) == pytest.approx(float(t), rel=1e-12)


def test_a_diagonal_is_exact_where_the_hessian_is_one() -> None:
    problem = Problem(
        update=Update(st.rules.SGD()), inner_loss=lambda w, h, b: (b * w**2).sum() / 2,
        outer_loss=lambda w, b: (b * w).sum(),
    )  # fmt: skip
    scales = random(6, seed=3).abs() + 0.1
    args = (random(6), {"lr": number(0.1)}, [scales] * 8, random(6, seed=4))
    truth = hypergradient(problem, st.Forward(), *args).grads
    found = hypergradient(problem, st.Forward(curvature="diagonal"), *args).grads
    assert float(found["lr"]) == pytest.approx(float(truth["lr"]), rel=1e-12)


def test_without_curvature_forward_is_a_trace() -> None:
    problem, hparams = problem_of("SGD")
    args = (random(6, seed=7), hparams, [data(s) for s in range(6)], data(9))
    first = hypergradient(problem, st.Forward(0.9, curvature="none"), *args).grads
    second = hypergradient(problem, st.Trace(0.9), *args).grads
    for n, value in first.items():
        assert float(second[n]) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.slow
def test_projections_are_unbiased_and_know_their_variance() -> None:
    """Monte Carlo: the mean over many draws, and the variance that each draw reports."""
    problem, _ = problem_of("SGD")
    hparams = {n: number(v) for n, v in dict(lr=0.05, weight_decay=0.2, l2=0.1, l1=0.05).items()}
    args = (random(6, seed=7), hparams, [data(s) for s in range(4)], data(9))
    truth = hypergradient(problem, st.Forward(), *args).grads
    draws = [hypergradient(problem, st.Forward(projections=2, seed=s), *args) for s in range(150)]
    found = torch.stack([torch.stack(list(d.grads.values())) for d in draws])
    want = torch.stack(list(truth.values()))
    spread = (found - want).square().sum(1)
    error = math.sqrt(float(spread.mean()) / len(draws))
    assert float((found.mean(0) - want).norm()) < 3 * error
    reported = torch.stack([d.variance for d in draws if d.variance is not None])
    assert float(reported.mean()) == pytest.approx(float(spread.mean()), rel=0.25)


# truncated reverse mode


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 5])
def test_a_horizon_is_a_run_from_where_it_begins(checkpoint: int) -> None:
    """Law: K steps back, whatever the checkpoints, equal all steps of a run that starts there."""
    problem, hparams = problem_of("AdamW")
    batches = [data(s) for s in range(11)]
    *_, end = points = list(problem.points(random(6, seed=7), hparams, batches))
    grads = random(6, seed=40)

    def tracked(estimator: st.Unrolled, some: list) -> dict[str, Tensor]:
        memory = estimator.init(problem, some[0], hparams)
        for point in some[:-1]:
            memory = estimator.observe(problem, memory, point, hparams)
            assert len(memory) <= 4 + checkpoint
        return estimator.estimate(problem, memory, end, hparams, grads).grads

    found = tracked(st.Unrolled(horizon=4, checkpoint=checkpoint), points)
    want = tracked(st.Unrolled(horizon=4), points[-5:])
    for n, value in want.items():
        torch.testing.assert_close(found[n], value, rtol=1e-13, atol=1e-15)


def test_windows_are_the_derivatives_of_a_schedule() -> None:
    """A schedule constant on windows of 3 steps: autograd in its values."""
    problem = regression("ridge", momentum=0.5)
    batches, start, grads = [data(s) for s in range(9)], random(6, seed=7), random(6, seed=40)

    def end(schedule: Tensor) -> Tensor:
        point = problem.start(start, {"lr": schedule[0]})
        for step, batch in enumerate(batches):
            point = problem.step(point._replace(batch=batch), {"lr": schedule[step // 3]})
        return point.params @ grads

    lr = torch.full((3,), 0.05, dtype=torch.float64)
    want = torch.func.grad(end)(lr)
    unrolled, hparams = st.Unrolled(share=3), {"lr": number(0.05)}
    memory = unrolled.init(problem, problem.start(start, hparams), hparams)
    for point in list(problem.points(start, hparams, batches))[:-1]:
        memory = unrolled.observe(problem, memory, point, hparams)
    found = unrolled.estimate(problem, memory, problem.run(start, hparams, batches), hparams, grads)
    assert found.windows is not None
    torch.testing.assert_close(found.windows["lr"] * 3, want, rtol=1e-12, atol=1e-14)


def test_checkpoints_free_what_lies_between() -> None:
    problem, hparams, unrolled = regression("ridge"), {"lr": number(0.05)}, st.Unrolled(20, 5)
    points = list(problem.points(random(6, seed=7), hparams, [data(s) for s in range(40)]))
    memory = unrolled.init(problem, points[0], hparams)
    for point in points[:-1]:
        memory = unrolled.observe(problem, memory, point, hparams)
    held = [p.point.params.untyped_storage().nbytes() for p in memory]
    assert sum(b > 0 for b in held) <= 5


# weights without gradient


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_never_have_a_gradient_do_no_harm(
    name: str, amsgrad: bool, dtype: torch.dtype
) -> None:
    """An input that is always 0; truth: finite differences, which do not divide by its root."""
    problem, hparams = problem_of(name, amsgrad=amsgrad)
    del hparams["l1"], hparams["l2"]
    hparams["weight_decay"] = number(0.0)
    at = {n: h.to(dtype) for n, h in hparams.items()}
    batches = [tuple(t.to(dtype) for t in data(s)) for s in range(6)]
    for x, _ in batches:
        x[:, 2] = 0.0
    start = random(6, seed=7).to(dtype)
    start[2] = 0.0
    args = (start, at, batches[:5], batches[5])
    truth = hypergradient(
        problem, FiniteDifference(1e-2 if dtype == torch.float32 else 1e-5), *args
    )
    for estimator in (st.Forward(), st.Unrolled(), st.Trace(1.0), st.Implicit(through="update")):
        found = hypergradient(problem, estimator, *args).grads
        assert all(bool(torch.isfinite(g)) for g in found.values()), estimator
        if isinstance(estimator, (st.Forward, st.Unrolled)):
            for n in ("lr", "decay"):
                want = float(truth.grads[n])
                assert float(found[n]) == pytest.approx(want, rel=0.05), (estimator, n)
