"""Wrong arguments of the functions below the drivers: an error that names the argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune.structure import NoiseScale

SGD = st.Update(st.rules.SGD())
BATCH = (torch.ones(4, 3), torch.ones(4, 1))


def estimate(**changes: Any) -> Any:
    problem, weights = st.as_problem(nn.Linear(3, 1), F.mse_loss, SGD)
    given = {
        "problem": problem, "estimator": st.Forward(), "params": weights,
        "hparams": {"lr": torch.tensor(0.1)}, "batches": [BATCH], "outer_batch": BATCH,
    }  # fmt: skip
    return st.estimators.hypergradient(**(given | changes))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: st.as_problem(3, F.mse_loss, SGD), "model=3"),  # type: ignore[arg-type]
        (lambda: st.as_problem(nn.ReLU(), F.mse_loss, SGD), "no parameters"),
        (
            lambda: st.as_problem(nn.Linear(3, 1), F.mse_loss, st.rules.SGD()),  # type: ignore[arg-type]
            "update=.*st.Update",
        ),
        (lambda: st.Update(3), "rule=3"),  # type: ignore[arg-type]
        (
            lambda: st.Update(st.rules.SGD(), st.penalties.L1()),  # type: ignore[arg-type]
            "penalties=.*must be",
        ),
        (lambda: estimate(estimator=None), "estimator=None"),
        (lambda: estimate(estimator=st.Forward), "estimator=.*must be an estimator"),
        (lambda: estimate(hparams={}), "hparams is empty"),
        (lambda: estimate(hparams={"lr": 0.1}), r"hparams\['lr'\]=0.1 must be a tensor"),
        (lambda: estimate(hparams={"lr": torch.tensor(1)}), "floating-point"),
        (lambda: estimate(batches=[]), "batches is empty"),
        (lambda: estimate(batches=[], estimator=st.Unrolled()), "batches is empty"),
        (lambda: NoiseScale().micro_batch(nn.Linear(2, 2).parameters()), "no gradients"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        call()


def test_a_solve_that_has_converged_has_not_diverged() -> None:
    """A singular system: after the solution, rounding looks like negative curvature."""
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    right = rows.T @ torch.ones(3)
    for count in (3, 10, 50, 100):
        found = st.CG(count).solve(lambda v: rows.T @ (rows @ v), right)
        assert bool(found.converged)
        assert not bool(found.diverged)
    nothing = st.Nystrom().solve(lambda v: rows.T @ (rows @ v), torch.zeros(8))
    assert bool(nothing.converged)
    assert not bool(nothing.diverged)


def test_a_product_of_nan_gives_a_solution_of_nan() -> None:
    """As for the other solvers; pseudo-inverses of NaN raise an error."""
    for solver in (st.CG(), st.Neumann(), st.Nystrom()):
        found = solver.solve(lambda v: v * torch.nan, torch.ones(4))
        assert not bool(found.converged)
