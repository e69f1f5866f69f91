"""What every estimator promises. Truths: autograd through the run, finite differences, laws."""

import io
from typing import Any

import pytest
import torch
from problems import data, model, number, random, regression, smoothed
from torch import Tensor

import selftune as st
from selftune.estimators import AbstractEstimator, Exact, FiniteDifference, hypergradient
from selftune.penalties import L1, L2

EXACT: dict[str, AbstractEstimator] = {
    "Forward": st.Forward(),
    "Unrolled": st.Unrolled(),
    "Unrolled, horizon of the run": st.Unrolled(horizon=400),
    "Unrolled, checkpoints": st.Unrolled(checkpoint=7),
}
ALL: dict[str, AbstractEstimator] = {
    **EXACT,
    "Exact": Exact(),
    "FiniteDifference": FiniteDifference(),
    "Forward, discounted": st.Forward(discount=0.9),
    "Forward, Gauss-Newton": st.Forward(curvature="gauss-newton"),
    "Forward, projected": st.Forward(projections=3),
    "Unrolled, 3 steps": st.Unrolled(horizon=3, checkpoint=2),
    "Implicit through the update": st.Implicit(through="update"),
    "Implicit, CG": st.Implicit(st.CG()),
    "Implicit, Nyström": st.Implicit(st.Nystrom()),
    "BestResponse": st.BestResponse(),
    "BestResponse, Gauss-Newton": st.BestResponse("gauss-newton"),
    "Trace": st.Trace(),
    "OneStep": st.OneStep(),
}
each = pytest.mark.parametrize("name", ALL)


def asked(name: str) -> dict[str, Tensor]:
    """Hyperparameters that an estimator can be asked for."""
    known = {"lr": number(0.05), "weight_decay": number(0.1)}
    estimator = ALL[name]
    if isinstance(estimator, st.Implicit) and estimator.through == "loss":
        del known["lr"]
    return known


def closeness(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return max(float((found[n] - t).norm() / t.norm()) for n, t in truth.items())


@pytest.mark.parametrize("loss", ["ridge", "logistic"])
@pytest.mark.parametrize("horizon", [1, 5, 50, pytest.param(400, marks=pytest.mark.slow)])
def test_exact_ones_equal_autograd_and_differences(loss: str, horizon: int) -> None:
    problem = regression(loss)
    hparams = {"lr": number(0.05), "momentum": number(0.6), "weight_decay": number(0.1)}
    if horizon == 1:
        del hparams["momentum"]  # which a first step does not know
    args = (random(6, seed=7), hparams, [data(s % 9) for s in range(horizon)], data(50))
    truth = hypergradient(problem, Exact(), *args).grads
    for name, estimator in EXACT.items():
        assert closeness(hypergradient(problem, estimator, *args).grads, truth) < 1e-12, name
    differences = hypergradient(problem, FiniteDifference(), *args).grads
    size = max(float(t.abs()) for t in truth.values())
    for n, t in truth.items():
        assert float(differences[n]) == pytest.approx(float(t), rel=1e-6, abs=1e-6 * size)


RULES: dict[str, tuple[Any, dict[str, float]]] = {
    "SGD": (st.rules.SGD(), dict(lr=0.05, momentum=0.8)),
    "AdamW": (st.rules.AdamW(), dict(lr=0.01, beta1=0.8, beta2=0.95, weight_decay=0.1)),
    "RMSprop": (st.rules.RMSprop(), dict(lr=0.01, momentum=0.5)),
    "Lion": (st.rules.Lion(), dict(lr=0.003, beta1=0.85, weight_decay=0.1)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", ["MLP", "conv", "LSTM", "transformer"])
def test_real_layers_under_every_rule(net: str, rule: str) -> None:
    made, values = RULES[rule]
    module, batches = model(net)
    update = st.Update(made, (L1(), L2()))
    own = {"eps": 1e-4} if "eps" in made.defaults else {}
    problem, weights = st.as_problem(module, smoothed, update, options=own)
    hparams = {n: number(v) for n, v in values.items()}
    hparams |= {"decay": number(0.1), "l1": number(1e-3), "l2": number(0.02),
                "label_smoothing": number(0.1)}  # fmt: skip
    args = (weights, hparams, batches[:4], batches[5])
    truth = hypergradient(problem, FiniteDifference(1e-6), *args).grads
    size = max(float(t.abs()) for t in truth.values())
    for estimator in (st.Forward(), st.Unrolled()):
        found = hypergradient(problem, estimator, *args).grads
        for n, t in truth.items():
            assert float(found[n]) == pytest.approx(float(t), rel=1e-4, abs=1e-7 * size), n


@each
def test_linear_in_the_outer_gradient(name: str) -> None:
    problem, hparams = split_ridge(), asked(name)
    memory, end = remembered(problem, ALL[name], hparams)
    a, b = random(6, seed=20), random(6, seed=21)

    def at(grads: Tensor) -> dict[str, Tensor]:
        return ALL[name].estimate(problem, memory, end, hparams, grads).grads

    both, first, second = at(2 * a - 3 * b), at(a), at(b)
    assert closeness(both, {n: 2 * first[n] - 3 * second[n] for n in hparams}) < 1e-6


def remembered(
    problem: st.Problem, estimator: AbstractEstimator, hparams: dict[str, Tensor], steps: int = 6
) -> tuple[Any, Any]:
    point = problem.start(random(6, seed=7).to(next(iter(hparams.values())).dtype), hparams)
    memory = estimator.init(problem, point, hparams)
    for s in range(steps):
        batch = tuple(t.to(point.params.dtype) for t in data(s))
        point = point._replace(batch=batch)
        memory = estimator.observe(problem, memory, point, hparams)
        point = problem.step(point, hparams)
    return memory, point


@each
def test_dtype_and_shape_are_kept(name: str) -> None:
    problem = split_ridge(segments=torch.tensor([0, 0, 1, 1, 2, 2]))
    hparams = {n: torch.full((3,), float(h)) for n, h in asked(name).items()}
    memory, end = remembered(problem, ALL[name], hparams)
    grads = random(6, seed=20).float()
    found = ALL[name].estimate(problem, memory, end, hparams, grads).grads
    for n, h in hparams.items():
        assert found[n].shape == h.shape, n
        assert found[n].dtype == torch.float32, n
        assert bool((found[n] != 0).all())


def split_ridge(**options: Any) -> st.Problem:
    predict = lambda w, h, b: b[0] @ w  # noqa: E731
    criterion = lambda out, h, b: (out - b[1]).square().mean() / 2  # noqa: E731
    return st.Problem(
        update=st.Update(st.rules.SGD()),
        inner_loss=lambda w, h, b: criterion(predict(w, h, b), h, b),
        outer_loss=lambda w, b: criterion(predict(w, {}, b), {}, b), split=(predict, criterion),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in ALL if n != "Forward, projected" and "BestResponse" not in n]
)
def test_values_of_segments_add_up_to_one_for_all(name: str) -> None:
    """Law: a shared hyperparameter's derivative is the sum over the segments that share it.

    Not so of random projections, which differ with the number of entries, nor of what is learned.
    """
    segments = torch.tensor([0, 0, 1, 1, 2, 2])
    grads = random(6, seed=20)
    found = []
    for problem, shape in ((split_ridge(), ()), (split_ridge(segments=segments), (3,))):
        hparams = {n: h.expand(shape).clone() for n, h in asked(name).items()}
        memory, end = remembered(problem, ALL[name], hparams)
        found.append(ALL[name].estimate(problem, memory, end, hparams, grads).grads)
    assert closeness({n: g.sum() for n, g in found[1].items()}, found[0]) < 1e-5


@each
def test_memory_survives_saving(name: str) -> None:
    problem, hparams = split_ridge(), asked(name)
    memory, end = remembered(problem, ALL[name], hparams)
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    grads = random(6, seed=20)
    first, second = (
        ALL[name].estimate(problem, m, end, hparams, grads).grads for m in (memory, again)
    )
    assert all(torch.equal(first[n], second[n]) for n in hparams)


@each
def test_misspelt_hyperparameters_are_named(name: str) -> None:
    args = (random(6), {"weight_deacy": number(0.1)}, [data(0)], data(1))
    with pytest.raises(ValueError, match=r"\['weight_deacy'\] influence neither"):
        hypergradient(split_ridge(), ALL[name], *args)


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(st.Unrolled(checkpoint=2), marks=pytest.mark.slow),
        pytest.param(st.Forward(), marks=pytest.mark.slow),
        pytest.param(st.Implicit(through="update", together=3), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("traced")
def test_compiled_problems_give_the_same(estimator: AbstractEstimator) -> None:
    net, batches = model("MLP")
    problem, weights = st.as_problem(net, smoothed, st.Update(st.rules.SGD()))
    hparams = {"lr": number(0.05), "momentum": number(0.5), "weight_decay": number(0.1)}
    args = (weights, hparams, batches[:5], batches[5])
    eager = hypergradient(problem, estimator, *args).grads
    fast = hypergradient(problem.compiled(), estimator, *args).grads
    assert closeness(fast, eager) < 1e-9
