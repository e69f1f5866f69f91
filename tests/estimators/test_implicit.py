"""Implicit differentiation. Truths: the closed form of ridge, steps looked back, and laws."""

import pytest
import torch
from problems import data, model, number, random, regression, smoothed

import selftune as st
from selftune.estimators import hypergradient
from selftune.update import Update

SOLVERS = {
    "Neumann": st.Neumann(terms=600),
    "CG": st.CG(iterations=12),
    "Nyström": st.Nystrom(rank=6, damping=1e-3),
}


@pytest.mark.parametrize(
    "solver",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "Neumann" else []) for n in SOLVERS],
)
def test_implicit_reaches_the_closed_form_of_ridge(solver: str) -> None:
    """w* = (A + λ)⁻¹ b, so dL_val/dλ = −∇L_valᵀ (A + λ)⁻¹ w*; the error falls as w does."""
    problem, lam = regression("ridge"), 0.3
    hparams, (x, y), outer = {"weight_decay": number(lam)}, data(0), data(1)
    matrix = x.T @ x / len(x) + lam * torch.eye(6, dtype=torch.float64)
    best = torch.linalg.solve(matrix, x.T @ y / len(x))
    slope = torch.func.grad(problem.outer_loss)(best, outer)
    damped = matrix + getattr(SOLVERS[solver], "damping", 0.0) * torch.eye(6, dtype=torch.float64)
    want = -float(slope @ torch.linalg.solve(damped, best))
    errors = []
    for steps in (1, 10, 100, 800):
        at = {**hparams, "lr": number(0.2)}
        params = problem.run(random(6, seed=7), at, [(x, y)] * steps).params
        implicit = st.Implicit(SOLVERS[solver])
        found = hypergradient(problem, implicit, params, hparams, [(x, y)], outer)
        assert found.solution is not None
        assert bool(found.solution.converged)
        errors.append(abs(float(found.grads["weight_decay"]) - want) / abs(want))
    assert errors[-1] < 1e-8
    assert errors[0] > errors[1] > errors[2]


def test_through_the_update_terms_look_back_one_step_each() -> None:
    """Law: at a fixed point k terms are the last k + 1 steps unrolled, rates and momentum too."""
    problem = regression("ridge")
    hparams = {"lr": number(0.1), "momentum": number(0.6), "weight_decay": number(0.2)}
    point = problem.run(random(6, seed=7), hparams, [data(0)] * 400)._replace(batch=data(0))
    grads, implicit = random(6, seed=40), st.Implicit(st.Neumann(terms=5), through="update")
    memory = implicit.observe(problem, implicit.init(problem, point, hparams), point, hparams)
    found = implicit.estimate(problem, memory, point, hparams, grads).grads
    unrolled = st.Unrolled()
    passed = unrolled.init(problem, point, hparams)
    for _ in range(5):
        passed = unrolled.observe(problem, passed, point, hparams)
        point = problem.step(point, hparams, data(0))
    want = unrolled.estimate(problem, passed, point, hparams, grads).grads
    assert float(found["weight_decay"]) == pytest.approx(float(want["weight_decay"]), rel=1e-8)
    for n in ("lr", "momentum"):  # at the very end they have no influence
        assert float(found[n]) == pytest.approx(float(want[n]), abs=1e-8)


def test_one_pass_starts_from_the_last_solution() -> None:
    """Two products a solve: from zero they stay far off, warm they get there over the solves."""
    problem, hparams = regression("ridge"), {"weight_decay": number(0.3)}
    point = problem.start(random(6, seed=7), hparams)._replace(batch=data(0))
    grads = random(6, seed=40)
    residuals = {}
    for warm in (False, True):
        implicit = st.Implicit(st.Neumann(terms=2), warm=warm)
        memory = implicit.observe(problem, implicit.init(problem, point, hparams), point, hparams)
        for _ in range(60):
            found, memory = implicit.solve(problem, memory, point, hparams, grads)
            assert found.solution is not None
            residuals[warm] = float(found.solution.residual)
    assert residuals[True] < 1e-3 < 0.05 < residuals[False]


def test_a_strength_for_each_weight() -> None:
    """Law: a λ shared by all weights has the sum of the derivatives of one each."""
    problem, outer = regression("ridge"), data(1)
    single = {"weight_decay": torch.full((6,), 0.3, dtype=torch.float64)}
    implicit = st.Implicit(st.CG(iterations=12))
    each = hypergradient(problem, implicit, random(6), single, [data(0)], outer).grads
    shared = {"weight_decay": number(0.3)}
    one = hypergradient(problem, implicit, random(6), shared, [data(0)], outer).grads
    assert float(each["weight_decay"].sum()) == pytest.approx(float(one["weight_decay"]), rel=1e-10)


def test_through_the_update_the_units_of_a_rules_state_do_not_count() -> None:
    """AdamW, whose second moment is in units of squared gradients; truth: as many steps back."""
    net, batches = model("MLP")
    problem, weights = st.as_problem(net, smoothed, Update(st.rules.AdamW()))
    hparams = {"lr": number(0.01), "beta2": number(0.99), "weight_decay": number(0.05)}
    steps = [batches[0]] * 150
    args = (weights, hparams, steps, batches[1])
    found = hypergradient(problem, st.Implicit(st.Neumann(10), through="update"), *args)
    want = hypergradient(problem, st.Unrolled(11), *args).grads
    assert found.solution is not None
    assert not bool(found.solution.diverged)
    for n, value in want.items():
        assert float(found.grads[n]) == pytest.approx(float(value), rel=0.5), n
