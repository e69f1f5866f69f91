"""The hyper optimizer. Truths: torch's optimizers run beside it, and laws."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor

from selftune.hyperstep import HyperOptimizer, HyperStep, adam

FREE = torch.tensor([math.inf], dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def sgd(raw: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(raw, lr=0.05)  # type: ignore[arg-type]


def rmsprop(raw: object) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(raw, lr=0.01, momentum=0.5)  # type: ignore[arg-type]


MAKES = pytest.mark.parametrize("make", [adam, sgd, rmsprop], ids=lambda f: f.__name__)


def noise(steps: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(
        steps, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@MAKES
def test_consistent_gradients_take_the_optimizers_own_steps(make: HyperOptimizer) -> None:
    """Truth: the torch optimizer alone, where all estimates agree and no bound is near."""
    pace = torch.tensor([1.0, 0.2], dtype=torch.float64)
    twin = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, ours = make([twin]), HyperStep(pace, make)
    for _ in range(30):
        gradient = torch.tensor([0.7, -0.3], dtype=torch.float64)
        twin.grad = gradient.clone()
        optimizer.step()
        ours.step(gradient, -FREE, FREE)
        torch.testing.assert_close(ours.raw.detach(), pace * twin.detach(), rtol=1e-12, atol=0)
    assert (ours.snr == 1).all()


@MAKES
def test_noise_moves_little(make: HyperOptimizer) -> None:
    """Laws: at most half of the optimizer's own walk, and a tenth of the way where all agree."""
    gradients = noise(200, 256).sign()
    twin = torch.zeros(256, dtype=torch.float64, requires_grad=True)
    optimizer = make([twin])
    noisy, steady = (HyperStep(torch.ones(256, dtype=torch.float64), make) for _ in range(2))
    walked = walked_alone = 0.0
    for gradient in gradients:
        before, before_alone = noisy.raw.detach().clone(), twin.detach().clone()
        twin.grad = gradient.clone()
        optimizer.step()
        noisy.step(gradient, -FREE, FREE)
        steady.step(torch.ones_like(gradient), -FREE, FREE)
        walked += float((noisy.raw - before).detach().abs().sum())
        walked_alone += float((twin.detach() - before_alone).abs().sum())
    assert walked < walked_alone / 2
    assert noisy.raw.square().mean().sqrt() < 0.1 * steady.raw.square().mean().sqrt()


def test_no_step_is_longer_than_the_longest() -> None:
    """Law: the length of each step is bounded, and the bound is met."""
    hyper = HyperStep(ONE, lambda raw: torch.optim.SGD(raw, lr=100.0), longest=0.25)
    hyper.step(ONE, -FREE, FREE)
    assert hyper.raw.tolist() == [-0.25]


@MAKES
def test_bounds_hold_and_are_left_at_once(make: HyperOptimizer) -> None:
    """Law: at a bound, the first step the optimizer proposes inward leaves it.

    Truth for the proposals: the torch optimizer alone, whose steps do not depend on the shift.
    """
    twin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, hyper = make([twin]), HyperStep(ONE, make)
    high = torch.full_like(ONE, 0.2)
    inward = 0
    for step in range(60):
        before = twin.detach().clone()
        gradient = -ONE if step < 40 else 0.9 * ONE
        twin.grad = gradient.clone()
        optimizer.step()
        hyper.step(gradient, -FREE, high)
        inward += bool(twin < before)
        if step >= 39:
            assert (float(hyper.raw.detach()) < 0.2) == (inward > 0)
    assert inward > 0
    if make is sgd:
        assert inward == 20  # without memory it is the first gradient that points inward


@MAKES
def test_state_round_trip_through_a_file(make: HyperOptimizer) -> None:
    """Law: a run continued from its state equals the run that went on, bit for bit."""
    gradients, high = noise(40, 3) + 0.5, torch.full_like(FREE, 0.1)
    hyper, again = (HyperStep(torch.ones(3, dtype=torch.float64), make) for _ in range(2))
    for gradient in gradients[:20]:
        hyper.step(gradient, -FREE, high)
    file = io.BytesIO()
    torch.save(hyper.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    for gradient in gradients[20:]:
        hyper.step(gradient, -FREE, high)
        again.step(gradient, -FREE, high)
    assert (hyper.raw != 0).all()
    torch.testing.assert_close(again.state_dict(), hyper.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_refused(bad: float) -> None:
    """Law: an error, and the state of before."""
    hyper = HyperStep(torch.ones(2, dtype=torch.float64))
    hyper.step(torch.tensor([1.0, 2.0], dtype=torch.float64), -FREE, FREE)
    before = copy.deepcopy(hyper.state_dict())
    with pytest.raises(ValueError, match="finite"):
        hyper.step(torch.tensor([1.0, bad], dtype=torch.float64), -FREE, FREE)
    torch.testing.assert_close(hyper.state_dict(), before, rtol=0, atol=0)


def test_reset_is_a_fresh_start_from_the_same_shifts() -> None:
    """Truth: a new HyperStep, offset by the shifts."""
    hyper, fresh = (HyperStep(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    for gradient in noise(5, 3):
        hyper.step(gradient, -FREE, FREE)
    hyper.reset()
    start = hyper.raw.detach().clone()
    for gradient in noise(5, 3, seed=1):
        hyper.step(gradient, -FREE, FREE)
        fresh.step(gradient, -FREE, FREE)
    torch.testing.assert_close(hyper.raw - start, fresh.raw.detach())
