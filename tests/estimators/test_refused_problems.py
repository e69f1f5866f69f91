"""What estimators refuse and report. Truths: messages, and the same model of plain operations."""

import logging
import math

import pytest
import torch
from problems import Once, data, model, number, random, regression, smoothed
from torch import Tensor

import selftune as st
from selftune.estimators import hypergradient
from selftune.problem import Problem
from selftune.update import Update

# what is refused


def test_operations_without_second_derivative_are_named() -> None:
    problem = Problem(
        update=Update(st.rules.SGD()), inner_loss=lambda w, h, b: Once.apply(w).sum(),
        outer_loss=lambda w, b: w.sum(), backend="double backward",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="backend='differences'"):
        hypergradient(problem, st.Forward(), random(3), {"lr": number(0.1)}, [None], None)


def test_a_horizon_beyond_memory_is_refused_before_it_runs() -> None:
    problem, start = regression("ridge"), torch.ones(6, dtype=torch.float64)
    with pytest.raises(MemoryError, match=r"horizon=1000000000000 keeps .* GB"):
        hypergradient(problem, st.Unrolled(10**12), start, {"lr": number(0.1)}, [data(0)], data(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.Trace(-0.1), "discount=-0.1"),
        (lambda: st.Trace(1.5), "discount=1.5"),
        (lambda: st.Forward(discount=2.0), "discount=2.0"),
        (lambda: st.Forward(curvature="block"), "curvature='block'"),
        (lambda: st.Forward(projections=0), "projections=0"),
        (lambda: st.Unrolled(horizon=0), "horizon=0"),
        (lambda: st.Unrolled(checkpoint=0), "checkpoint=0"),
        (lambda: st.Unrolled(share=0), "share=0"),
        (lambda: st.Implicit(through="rule"), "through='rule'"),
        (lambda: st.Implicit(together=0), "together=0"),
        (lambda: st.Implicit(st.CG(), through="update"), "solver=CG"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_are_refused_where_the_loss_does_not_know_them() -> None:
    args = (random(6), {"lr": number(0.1)}, [data(0)], data(1))
    with pytest.raises(ValueError, match=r"\['lr'\] do not enter the training loss"):
        hypergradient(regression("ridge"), st.Implicit(), *args)


def test_gauss_newton_needs_the_loss_in_two() -> None:
    args = (random(6), {"lr": number(0.1)}, [data(0)], data(1))
    with pytest.raises(ValueError, match="split"):
        hypergradient(regression("ridge"), st.Forward(curvature="gauss-newton"), *args)


@pytest.mark.parametrize("shape", [(1,), (5,), (6, 1)])
@pytest.mark.parametrize("estimator", [st.Trace(), st.Forward(), st.Implicit(through="update")])
def test_shapes_that_fit_nothing_are_refused(estimator: st.Trace, shape: tuple) -> None:
    args = (random(6), {"lr": torch.full(shape, 0.1).double()}, [data(0)], data(1))
    with pytest.raises(ValueError, match=r"hparams\['lr'\] has shape"):
        hypergradient(regression("ridge"), estimator, *args)


# what is reported


def test_a_solve_that_diverges_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem(
        update=Update(st.rules.SGD()), inner_loss=lambda w, h, b: (b * w**2).sum() / 2,
        outer_loss=lambda w, b: w.sum(),
    )  # fmt: skip
    indefinite = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    args = (random(3), {"weight_decay": number(0.1)}, [indefinite], None)
    with caplog.at_level(logging.WARNING, "selftune"):
        found = hypergradient(problem, st.Implicit(st.CG()), *args)
    assert "diverged" in caplog.text
    assert found.solution is not None
    assert bool(found.solution.diverged)
    assert float(found.solution.residual) <= 1
    assert math.isfinite(float(found.grads["weight_decay"]))


def test_operations_without_second_derivative_inside_a_model_are_noticed() -> None:
    """Only part of the curvature would be missing; truth: the same model with plain operations."""
    inner, outer = random(4, 6, seed=1), random(5, seed=2)

    def loss(w, h, b, cube) -> Tensor:
        return (cube(inner @ w[:6]).sum() + outer @ w[6:]).square()

    found = []
    for cube in (Once.apply, lambda x: x**2):
        problem = Problem(
            update=Update(st.rules.SGD()), inner_loss=lambda w, h, b, c=cube: loss(w, h, b, c),
            outer_loss=lambda w, b: w.sum(),
        )  # fmt: skip
        args = (random(11, seed=3), {"lr": number(1e-4)}, [None] * 3, None)
        found.append(float(hypergradient(problem, st.Forward(), *args).grads["lr"]))
        assert problem.products.backend == (
            "differences" if cube == Once.apply else "double backward"
        )
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_check_tells_exact_from_biased() -> None:
    net, batches = model("MLP")
    problem, weights = st.as_problem(net, smoothed, Update(st.rules.AdamW()))
    hparams = {"lr": number(0.1), "label_smoothing": number(0.1)}
    args = (weights, hparams, batches[:5], batches[5])
    exact = st.testing.check_hypergradient(problem, st.Forward(), *args)
    assert exact.agrees
    assert "agrees with finite differences" in str(exact)
    biased = st.testing.check_hypergradient(problem, st.OneStep(), *args)
    assert not biased.agrees
    assert biased.cosine < 0.9999
    assert "biased" in biased.sentence


def test_the_check_says_when_differences_are_no_yardstick() -> None:
    """float32 over many steps at a high rate: the reference itself is noise."""
    problem = regression("ridge")
    batches = [tuple(t.float() for t in data(s)) for s in range(60)]
    args = (random(6).float(), {"lr": torch.tensor(0.9)}, batches, batches[0])
    verdict = st.testing.check_hypergradient(problem, st.OneStep(), *args)
    assert "unreliable" in verdict.sentence
