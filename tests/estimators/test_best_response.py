"""The learned response. Truths: closed forms, Forward's exact Jacobian, double backward."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from problems import data, model, number, random, regression, smoothed
from torch import Tensor, nn

import selftune as st
from selftune.estimators.best_response import linearised_gradient, signs

SHAPES = {"vector": torch.Size([6]), "matrix": torch.Size([1, 6])}


def learned(
    problem: st.Problem, estimator: Any, hparams: dict[str, Tensor], steps: int
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    point = problem.start(random(6, seed=7), hparams)
    memory = estimator.init(problem, point, hparams)
    for _ in range(steps):
        point = problem.known(point._replace(batch=data(0)), hparams)
        memory = estimator.observe(problem, memory, point, hparams)
        point = problem.step(point, hparams)
    return memory, point


def jacobian(problem: st.Problem, memory: Any, count: int) -> Tensor:
    """dw/d(raw), a row a hyperparameter."""
    moves = torch.eye(count, dtype=torch.float64)
    params = random(6)
    return torch.stack([st.BestResponse().shift(problem, memory, params, m) for m in moves])


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("shape", "curvature"),
    [
        *[("vector", "exact")],
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("vector", "gauss-newton"),
                ("matrix", "exact"),
                ("matrix", "gauss-newton"),
            ]
        ],
    ],
)
def test_ridge_has_its_closed_form_response_to_the_penalty(shape: str, curvature: str) -> None:
    problem = ridge(SHAPES[shape], lr=0.1)
    strength = {"weight_decay": number(0.2)}
    memory, _ = learned(problem, st.BestResponse(curvature, scale=0.2, discount=1.0), strength, 200)
    x, y = data(0)
    hessian = x.T @ x / 20 + 0.2 * torch.eye(6, dtype=torch.float64)
    truth = -torch.linalg.solve(hessian, 0.2 * torch.linalg.solve(hessian, x.T @ y / 20))
    assert error(jacobian(problem, memory, 1)[0], truth) < 0.02


@pytest.mark.parametrize("horizon", [5, 20, 50])
def test_a_learning_rate_has_its_response_of_finite_horizon(horizon: int) -> None:
    """Truth: Forward's Jacobian, and on a quadratic w_T = (1 − η a)^T w_0 in closed form."""
    problem, rate = ridge(SHAPES["vector"]), {"lr": number(0.05)}
    memory, _ = learned(problem, st.BestResponse(discount=1.0, scale=0.2), rate, horizon)
    exact, _ = learned(problem, st.Forward(), rate, horizon)
    assert error(jacobian(problem, memory, 1)[0], 0.05 * exact.tangent.params[0]) < 0.05

    curves = torch.tensor([0.2, 0.5, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    quadratic = replace(
        problem, inner_loss=lambda w, h, b: (curves * w.square()).sum() / 2, shapes=None
    )
    memory, _ = learned(quadratic, st.BestResponse(discount=1.0, scale=0.2), rate, horizon)
    start = random(6, seed=7)
    truth = -horizon * 0.05 * curves * (1 - 0.05 * curves) ** (horizon - 1) * start
    assert error(jacobian(quadratic, memory, 1)[0], truth) < 0.05


@pytest.mark.parametrize(
    ("shape", "gap"),
    [
        *[("matrix", 1e-15)],
        *[
            pytest.param(shape, gap, marks=pytest.mark.slow)
            for shape, gaps in {
                "vector": (0.0, 1e-15, 1e-9, 1e-4),
                "matrix": (0.0, 1e-9, 1e-4),
            }.items()
            for gap in gaps
        ],
    ],
)
def test_a_lone_strength_near_its_bound_is_learned_from_the_steps_that_move_it(
    shape: str, gap: float
) -> None:
    """Truth: the closed form; a step that the bound cuts off tells nothing but rounding errors."""
    problem = ridge(SHAPES[shape], lr=0.1)
    bound = problem.update.hparams["weight_decay"].bounded(1e-10, 0.2)
    problem = replace(problem, scales={"weight_decay": bound})
    strength = {"weight_decay": number(0.2 * (1 - gap))}
    memory, _ = learned(problem, st.BestResponse(scale=0.2, discount=1.0), strength, 400)
    x, y = data(0)
    hessian = x.T @ x / 20 + 0.2 * torch.eye(6, dtype=torch.float64)
    truth = -torch.linalg.solve(hessian, 0.2 * torch.linalg.solve(hessian, x.T @ y / 20))
    assert error(jacobian(problem, memory, 1)[0], truth) < 0.15


def ridge(shape: torch.Size, **options: float) -> st.Problem:
    """With its loss in two parts."""
    criterion = lambda out, h, b: (out - b[1]).square().mean() / 2  # noqa: E731
    return replace(
        regression("ridge", **options), shapes=[shape],
        split=(lambda w, h, b: b[0] @ w, criterion),
    )  # fmt: skip


def test_several_hyperparameters_move_together() -> None:
    problem = ridge(SHAPES["vector"])
    hparams = {"lr": number(0.05), "weight_decay": number(0.1)}
    memory, _ = learned(problem, st.BestResponse(discount=1.0, scale=0.1), hparams, 20)
    exact, _ = learned(problem, st.Forward(), hparams, 20)
    truth = exact.tangent.params * torch.stack(list(hparams.values()))[:, None]
    found = jacobian(problem, memory, 2)
    assert error(found[0], truth[0]) < 0.08
    assert error(found[1], truth[1]) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("rule", [st.rules.SGD(), st.rules.AdamW()], ids=["SGD", "AdamW"])
def test_momentum_does_not_change_where_the_response_ends(rule: Any) -> None:
    options = {"lr": 0.02, "momentum": 0.9} if isinstance(rule, st.rules.SGD) else {"lr": 0.01}
    x, y = data(0)
    criterion = lambda out, h, b: (out - b[1]).square().mean() / 2  # noqa: E731
    problem = st.Problem(
        update=st.Update(rule), options=options, outer_loss=lambda w, b: w.sum(),
        inner_loss=lambda w, h, b: criterion(b[0] @ w, h, b) + h["l2"] * w.square().sum() / 2,
    )  # fmt: skip
    estimator = st.BestResponse(discount=1.0, scale=0.2)
    memory, _ = learned(problem, estimator, {"l2": number(0.2)}, 650)
    hessian = x.T @ x / 20 + 0.2 * torch.eye(6, dtype=torch.float64)
    truth = -torch.linalg.solve(hessian, 0.2 * torch.linalg.solve(hessian, x.T @ y / 20))
    assert error(jacobian(problem, memory, 1)[0], truth) < 0.05


@pytest.mark.parametrize(
    ("count", "top"),
    [
        (2, 3.0),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(10, 1.0), (1, 30.0), (3, 3.0), (6, 3.0)]
        ],
    ],
)
def test_it_is_stable_where_training_is(count: int, top: float) -> None:
    """Truth: w = h v / c in closed form; momentum's limit is a curvature of 38.

    Alone up to four fifths of it; several, whose signs beat with J's swing, to a fraction.
    """
    curves = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64) * top
    pulls = torch.stack([random(6, seed=20 + k) for k in range(count)])
    hparams = {f"h{k}": number(0.3) for k in range(count)}
    forces = lambda h: torch.stack([h[n] for n in hparams]) @ pulls  # noqa: E731
    problem = st.Problem(
        update=st.Update(st.rules.SGD()), options={"lr": 0.1, "momentum": 0.9},
        inner_loss=lambda w, h, b: (curves * w.square()).sum() / 2 - forces(h) @ w,
        outer_loss=lambda w, b: w.sum(),
    )  # fmt: skip
    memory, _ = learned(problem, st.BestResponse(discount=1.0, scale=0.1), hparams, 600)
    assert error(jacobian(problem, memory, count), 0.3 * pulls / curves) < 0.05


@pytest.mark.parametrize("net", ["MLP", "conv", "transformer"])
def test_gauss_newton_gradients_are_those_of_double_backward(net: str) -> None:
    module, batches = model(net)
    module.train(net != "conv")
    problem, weights = st.as_problem(module, smoothed, st.Update(st.rules.SGD()))
    point = problem.start(weights, {"lr": number(0.1)}, batches[0])
    near, shift = {"label_smoothing": number(0.2)}, 0.1 * random(len(weights), seed=3)
    assert problem.split is not None
    outputs, criterion = problem.split
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        held = weights.clone().requires_grad_()
        out = outputs(held, near, batches[0])
        dummy = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, held, dummy, create_graph=True)
        (forward,) = torch.autograd.grad(back, dummy, shift, retain_graph=True)
        there = (out + forward).detach().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(there, near, batches[0]), there)
        (expected,) = torch.autograd.grad(out, held, slope)
        found = linearised_gradient(problem, point, shift, near)
    assert error(found, expected) < 1e-6


def test_signs_of_a_period_are_uncorrelated() -> None:
    rows = torch.stack([signs(torch.tensor([t]), 1, 7) for t in range(8)]).double()
    assert torch.equal(rows.T @ rows, 8 * torch.eye(7, dtype=torch.float64))


def test_its_memory_does_not_grow_with_the_number_of_hyperparameters() -> None:
    module, batches = model("MLP")
    problem, weights = st.as_problem(module, smoothed, st.Update(st.rules.SGD()))
    sizes = []
    for count in (1, 4):
        names = ["lr", "weight_decay", "momentum", "label_smoothing"][:count]
        hparams = {n: number(0.1) for n in names}
        point = problem.start(weights, hparams, batches[0])
        memory = st.BestResponse().init(problem, point, hparams)
        matrices = [t for t in memory.tensors if not t.free]
        sizes.append(sum(t.rows.numel() for t in matrices))
    assert sizes[0] == sizes[1] == sum(p.numel() for p in module.parameters() if p.ndim > 1)


def test_a_response_that_is_not_finite_is_not_learned() -> None:
    problem = ridge(SHAPES["vector"])
    hparams = {"weight_decay": number(0.1)}
    memory, point = learned(problem, st.BestResponse(), hparams, 5)
    bad = (data(0)[0] * torch.nan, data(0)[1])
    after = st.BestResponse().observe(problem, memory, point._replace(batch=bad), hparams)
    assert torch.equal(after.tensors[0].gains, memory.tensors[0].gains)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"curvature": "hessian"}, "curvature='hessian' must be 'exact' or 'gauss-newton'"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"discount": 1.5}, "discount=1.5 must be above 0"),
    ],
)
def test_unsuitable_arguments_are_named(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        st.BestResponse(**options)


def test_optimizers_have_no_outputs_to_linearise() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="needs the model's output and a loss of it"):
        st.SGD(model.parameters(), lr=0.1, estimator=st.BestResponse("gauss-newton"))


def test_too_many_hyperparameters_are_refused() -> None:
    problem = regression("ridge")
    hparams = {"weight_decay": torch.full((2000,), 0.1)}
    with pytest.raises(ValueError, match=r"2000 columns.*use Implicit"):
        st.BestResponse().init(problem, problem.start(torch.ones(2000), hparams), hparams)


def test_options_of_a_step_count_as_those_of_the_problem() -> None:
    """Law: a weight decay that a tuner moves acts as one that was given from the start."""
    found = []
    for given in (True, False):
        options = {"momentum": 0.9, "weight_decay": 0.3 if given else 0.0}
        problem = ridge(SHAPES["vector"], **options)
        rate = {"lr": number(0.02)}
        point = problem.start(random(6, seed=7), rate)
        memory = st.BestResponse().init(problem, point, rate)
        for s in range(10):
            point = point._replace(batch=data(s), options={"weight_decay": 0.3})
            memory = st.BestResponse().observe(problem, memory, point, rate)
            point = problem.step(problem.known(point, rate), rate)
        found.append(memory.tensors[0].gains)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shell", [st.SGD, st.Adam, partial(st.AdamW, weight_decay=0.0)])
def test_hyperparameters_that_start_at_0_have_a_response(
    shell: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: torch's defaults of momentum and weight decay are no reason to rewind a healthy run."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    opt = shell(net, lr=0.01, estimator=st.BestResponse(), probe=False)
    x = torch.randn(32, 4)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    before = opt.hparams
    for _ in range(30):
        opt.step(closure)
        opt.hyper_step(lambda: (net(x) - x.sum(1, keepdim=True)).square().mean())
    assert "not finite" not in caplog.text
    changed = {n for n, v in opt.hparams.items() if v != before[n]}
    assert {"lr", "weight_decay"} <= changed
