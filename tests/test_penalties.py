"""Penalties. Truths: autograd of the value, sums by hand, and a brute-force argmin."""

import pytest
import torch
from torch import Tensor

from selftune._flat import Layout
from selftune.penalties import (
    GATE_AXES,
    L1,
    L2,
    AbstractPenalty,
    Elastic,
    Gates,
    Group,
    Joined,
    ProximalL1,
)

ALL = [L1(), ProximalL1(), L2(), Elastic(), Group(), Gates()]
SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (2, 3, 2, 2), (4, *GATE_AXES), ()]


def name(thing: object) -> str:
    return type(thing).__name__ if isinstance(thing, AbstractPenalty) else str(thing)


def weights(*shape: int) -> Tensor:
    return torch.randn(size=shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("penalty", ALL, ids=name)
def test_gradient_is_that_of_the_value(penalty: AbstractPenalty, shape: tuple[int, ...]) -> None:
    """Truth: autograd of ``value``."""
    w = weights(*shape).requires_grad_()
    (want,) = torch.autograd.grad(penalty.value(w), w)
    got = penalty.gradient(w.detach())
    assert got.shape == w.shape
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


W = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
BY_HAND = [
    (L1(), 7.0),
    (ProximalL1(), 7.0),
    (L2(), 12.5),
    (Elastic(), 19.5),
    (Group(), 5 * 2**0.5),
]


@pytest.mark.parametrize(("penalty", "value"), BY_HAND, ids=name)
def test_value_by_hand_and_no_pull_on_zeros(penalty: AbstractPenalty, value: float) -> None:
    """Closed form on a 3-4-5 row; a row of zeros has the subgradient 0."""
    assert float(penalty.value(W)) == pytest.approx(value, rel=1e-14)
    assert penalty.gradient(W)[1].tolist() == [0.0, 0.0]


def test_group_counts_vectors_as_rows_of_one() -> None:
    """Closed form: Σ|w| for a bias."""
    w = weights(5)
    torch.testing.assert_close(Group().value(w), w.abs().sum())


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_prox_is_the_argmin(threshold: float) -> None:
    """Brute force: the x of a fine grid that minimises ½(x − w)² + threshold·|x|."""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    points = torch.tensor(
        [-2.5, -1.0, -0.2999, -0.1, 0.0, 0.2, 0.31, 0.9, 2.0], dtype=torch.float64
    )
    objective = (grid - points[:, None]).square() / 2 + threshold * grid.abs()
    want = grid[objective.argmin(1)]
    got = ProximalL1.prox(points, threshold)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # the grid's spacing
    assert (got[points.abs() < threshold] == 0).all()


def test_prox_with_a_threshold_for_each_weight() -> None:
    """Truth: the prox of each weight on its own."""
    w, threshold = weights(6), weights(6).roll(1).abs()
    each = [ProximalL1.prox(a, float(t)) for a, t in zip(w, threshold, strict=True)]
    torch.testing.assert_close(ProximalL1.prox(w, threshold), torch.stack(each))


@pytest.mark.parametrize("penalty", ALL, ids=name)
def test_joined_equals_a_loop_over_tensors(penalty: AbstractPenalty) -> None:
    """Truth: the penalty of each tensor in its own shape; autograd agrees on the flat vector."""
    tensors = [weights(*s) for s in SHAPES if s]
    layout = Layout(tensors)
    joined = Joined(penalty=penalty, layout=layout)
    flat = layout.flatten(tensors).requires_grad_()
    value = joined.value(flat)
    by_loop = torch.stack([penalty.value(t) for t in tensors]).sum()
    torch.testing.assert_close(value.detach(), by_loop)
    (want,) = torch.autograd.grad(value, flat)
    torch.testing.assert_close(joined.gradient(flat.detach()), want)
    assert joined.name == penalty.name


def test_gates_alone_are_penalised() -> None:
    """By hand: Σ|g| of the gates; whatever has another shape counts 0."""
    tensors = [weights(5), weights(4, *GATE_AXES), weights(3, 2)]
    layout = Layout(tensors)
    joined, flat = Joined(penalty=Gates(), layout=layout), layout.flatten(tensors)
    assert float(joined.value(flat)) == pytest.approx(float(tensors[1].abs().sum()))
    want = torch.cat([torch.zeros(5), tensors[1].sign().flatten(), torch.zeros(6)])
    assert torch.equal(joined.gradient(flat), want.double())
