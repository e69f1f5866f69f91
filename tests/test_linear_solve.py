"""Solvers. Truth: torch.linalg.solve; and failing rightly where there is no solution to find."""

import pytest
import torch
from torch import Tensor

from selftune.linear_solve import CG, AbstractSolver, Neumann, Nystrom

SIZE = 30


def system(low: float, high: float) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with eigenvalues spread from low to high, and a right-hand side."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(draw)[0]
    matrix = basis @ torch.diag(torch.linspace(low, high, SIZE, dtype=torch.float64)) @ basis.T
    return matrix, torch.randn(SIZE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "solver",
    [Neumann(300), Neumann(300, scale=0.3), CG(SIZE + 5), Nystrom(SIZE, damping=1e-8)],
    ids=["Neumann", "Neumann with a scale", "CG", "Nystrom"],
)
def test_solvers_reach_the_solution(solver: AbstractSolver) -> None:
    matrix, rhs = system(0.3, 3.0)
    found = solver.solve(lambda v: matrix @ v, rhs)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, rhs), rtol=1e-5, atol=1e-6)
    residual = (rhs - matrix @ found.value).norm() / rhs.norm()
    assert float(found.residual) == pytest.approx(float(residual), abs=1e-7)
    assert bool(found.converged)
    assert not bool(found.diverged)


def test_a_series_that_diverges_says_so_and_keeps_its_best_sum() -> None:
    matrix, rhs = system(0.3, 3.0)
    found = Neumann(50, scale=1.0).solve(lambda v: matrix @ v, rhs)
    assert bool(found.diverged)
    assert not bool(found.converged)
    assert float((rhs - matrix @ found.value).norm()) <= float(rhs.norm())


@pytest.mark.parametrize("solver", [Neumann(100), CG(60)], ids=["Neumann", "CG"])
def test_an_indefinite_system_is_reported(solver: AbstractSolver) -> None:
    matrix, rhs = system(-1.0, 2.0)
    found = solver.solve(lambda v: matrix @ v, rhs)
    assert bool(found.diverged)
    assert bool(torch.isfinite(found.value).all())
    assert float(found.residual) <= 1


def test_a_singular_system_does_not_converge_unless_it_is_damped() -> None:
    matrix, rhs = system(0.0, 3.0)
    assert not bool(CG(60, tolerance=1e-8).solve(lambda v: matrix @ v, rhs).converged)
    found = CG(60, damping=0.1).solve(lambda v: matrix @ v, rhs)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(SIZE, dtype=torch.float64), rhs)
    torch.testing.assert_close(found.value, exact, rtol=1e-6, atol=1e-8)


def test_a_low_rank_is_never_worse_than_nothing() -> None:
    matrix, rhs = system(0.3, 3.0)
    found = Nystrom(5).solve(lambda v: matrix @ v, rhs)
    assert found.iterations == 6
    assert 0 < float(found.residual) <= 1
    assert float(found.value @ rhs) > 0


def test_a_start_is_used_if_it_helps() -> None:
    matrix, rhs = system(0.3, 3.0)
    exact = torch.linalg.solve(matrix, rhs)
    near, far = (Neumann(3).solve(lambda v: matrix @ v, rhs, s * exact) for s in (0.99, -50.0))
    none = Neumann(3).solve(lambda v: matrix @ v, rhs)
    assert float(near.residual) < 0.1 * float(none.residual)
    assert float(far.residual) == pytest.approx(float(none.residual))


def test_solves_map_over_right_hand_sides() -> None:
    matrix, rhs = system(0.3, 3.0)
    many = torch.stack([rhs, 2 * rhs, -rhs])
    solve = lambda b: CG(10).solve(lambda v: matrix @ v, b).value  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(solve)(many), torch.stack([solve(b) for b in many]))


def test_no_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="damping=0 must be above 0"):
        Nystrom(damping=0)


@pytest.mark.parametrize("solver", [Neumann(10), Neumann(10, scale=0.5), CG(10)])
def test_no_curvature_at_all(solver: AbstractSolver) -> None:
    """Truth: nothing is better than 0 (it was infinite, and hypergradients with it)."""
    found = solver.solve(lambda v: 0 * v, torch.ones(3))
    assert bool(torch.isfinite(found.value).all())
    assert float(found.residual) == 1
    assert not bool(found.converged)
    if not (isinstance(solver, Neumann) and solver.scale):  # of which it is no sign
        assert bool(found.diverged)
        assert not found.value.any()
