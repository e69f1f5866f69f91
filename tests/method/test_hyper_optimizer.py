"""The step of the hyperparameters. Truths: torch's optimizers run beside it, and laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from twins import SETTINGS, SIZE, Ours, Twin, adam, free, frees, noise, rmsprop, sgd, vector

from selftune.bijections import Logit
from selftune.hparams import LR, Hparam
from selftune.method import HyperOptimizer, HyperSettings
from selftune.method.hyper_optimizer import trust

MAKES = pytest.mark.parametrize("make", [adam, sgd, rmsprop], ids=lambda f: f.__name__)


@MAKES
def test_consistent_gradients_take_the_optimizers_own_steps(make: Any) -> None:
    """Truth: the torch optimizer alone, where all estimates agree and no bound is near."""
    twin = Twin(2, make)
    ours = Ours({"h0": free(0), "h1": free(1, pace=0.2)}, make)
    for _ in range(30):
        raw, alone = ours.step(vector(0.7, -0.3)), twin.step(vector(0.7, -0.3))
        torch.testing.assert_close(raw, vector(1.0, 0.2) * alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.state.mean.square(), ours.state.square)


@MAKES
def test_noise_moves_little(make: Any) -> None:
    """Laws: at most half of the optimizer's own walk, and a tenth of the way where all agree."""
    twin = Twin(256, make)
    noisy, steady = (Ours(frees(256), make) for _ in range(2))
    walked = walked_alone = 0.0
    for gradient in noise(200, 256).sign():
        before, alone = noisy.state.raw, twin.raw.detach().clone()
        walked_alone += float((twin.step(gradient) - alone).abs().sum())
        walked += float((noisy.step(gradient) - before).abs().sum())
        steady.step(torch.ones_like(gradient))
    assert walked < walked_alone / 2
    assert noisy.state.raw.square().mean().sqrt() < 0.1 * steady.state.raw.square().mean().sqrt()


@pytest.mark.parametrize("recent", [0.7, 0.8, 0.95])
def test_trust_is_a_quarter_where_hypergradients_are_noise(recent: float) -> None:
    """Closed form: the mean's variance is (1 − β)/(1 + β) of the square's mean; 1 if all agree."""
    settings = HyperSettings(recent=recent)
    mean, square = vector(math.sqrt((1 - recent) / (1 + recent)), 3.0, 0.0), vector(1.0, 9.0, 0.0)
    torch.testing.assert_close(trust(mean, square, settings), vector(0.25, 1.0, 0.0))


def test_no_step_is_longer_than_the_longest() -> None:
    """Law: the length of each step is bounded, and the bound is met."""
    ours = Ours(
        frees(2), lambda raw: torch.optim.SGD(raw, lr=100.0), settings=HyperSettings(longest=0.25)
    )
    assert ours.step(vector(1.0, -1.0)).tolist() == [-0.25, 0.25]


@MAKES
def test_bounds_hold_and_are_left_at_once(make: Any) -> None:
    """Law: at a bound, the first step the optimizer proposes inward leaves it.

    Truth for the proposals: the torch optimizer alone, whose steps do not depend on the shift.
    """
    twin, ours = Twin(1, make), Ours(frees(1, upper=0.2), make)
    inward = 0
    for step in range(60):
        before = twin.raw.detach().clone()
        gradient = vector(-1.0 if step < 40 else 0.9)
        inward += bool(twin.step(gradient) < before)
        ours.step(gradient)
        if step >= 39:
            assert (float(ours.state.raw) < 0.2) == (inward > 0)
    assert inward > 0
    if make is sgd:
        assert inward == 20  # without memory it is the first gradient that points inward


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hypergradients_that_are_not_finite_move_nothing(bad: float) -> None:
    """Law: the state is that of before, whichever of them it is."""
    ours = Ours(frees(2))
    ours.step(vector(1.0, 2.0))
    before = ours.state
    for signal in (vector(1.0, bad), vector(bad, 1.0)):
        ours.step(signal)
        assert all(torch.equal(a, b) for a, b in zip(before, ours.state, strict=True))


def test_forgetting_is_a_fresh_start_from_the_same_shifts() -> None:
    """Truth: a new hyper optimizer, offset by the shifts."""
    ours, fresh = Ours(frees(3)), Ours(frees(3))
    for gradient in noise(5, 3):
        ours.step(gradient)
    start = ours.state.raw
    ours.state = ours.state.forget()
    for gradient in noise(5, 3, seed=1):
        ours.step(gradient)
        fresh.step(gradient)
    torch.testing.assert_close(ours.state.raw - start, fresh.state.raw)


@pytest.mark.parametrize("divergences", [1, 3])
@pytest.mark.parametrize(
    ("below", "share"), [(4.0, 1.0), (3.0, 1.0), (3**0.75, 0.75), (1.0, 0.0), (0.5, 0.0)]
)
def test_the_rate_rises_slowly_near_the_peak_of_a_divergence(
    divergences: int, below: float, share: float
) -> None:
    """Closed form: log(peak / rate) / log 3 between 1/(1 + n) and 1; falls are as before."""
    for slope in (-1.0, 1.0):
        ours, free = Ours({"lr": LR}), Ours({"lr": LR})
        for _ in range(divergences):
            ours.state = ours.state.diverged()
        ours.state = ours.state.forget()._replace(raw=ours.state.raw - math.log(below))
        start = float(ours.state.raw)
        ours.step(vector(slope))
        free.step(vector(slope))
        factor = max(share, 1 / (1 + divergences)) if slope < 0 else 1.0
        assert float(ours.state.raw) - start == pytest.approx(factor * float(free.state.raw))


def test_without_caution_divergences_change_no_step() -> None:
    """Twin: one that never diverged."""
    ours, free = (Ours({"lr": LR}, settings=HyperSettings(caution=1.0)) for _ in range(2))
    ours.state = ours.state.diverged()
    for made in (ours, free):
        made.step(vector(-1.0))
    assert ours.state.raw.tolist() == free.state.raw.tolist()


def test_those_that_do_not_move_stay_and_the_others_step_as_alone() -> None:
    """Twin: one alone; what the other's gradient says is not looked at."""
    ours, alone = Ours(frees(2)), Ours(frees(1))
    for gradient in noise(20, 1):
        ours.step(torch.cat([gradient, vector(5.0)]), moving=["h0"])
        alone.step(gradient)
    assert ours.state.raw.tolist() == [float(alone.state.raw), 0.0]
    assert float(ours.state.mean[1]) == 0.0


# step sizes


@pytest.mark.parametrize(
    ("total", "every", "size"),
    [(None, 5, 0.05), (120, 5, 0.05 * (1000 / 120) ** 0.5), (360, 12, 0.12 * (1000 / 360) ** 0.5),
     (900, 20, 0.2 * (1000 / 900) ** 0.5), (10**6, 20, 0.2)],
)  # fmt: skip
def test_how_often_and_how_far(total: int | None, every: int, size: float) -> None:
    """The arithmetic by hand: a thirtieth of the run, 1 % a step, √(1000/T) more in short runs."""
    assert SETTINGS.every(total) == every
    assert SETTINGS.size(every, total) == pytest.approx(size)


def test_layer_hyperparameters_step_as_with_adam_however_noisy() -> None:
    """Truth: torch's Adam, at twice the size; the rate is held back where gradients disagree."""
    layer = Hparam(
        name="layer", bijection=Logit(), lower=1e-3, upper=0.99, from_zero=0.01,
        role="layer", pace=2.0,
    )  # fmt: skip
    hyper = HyperOptimizer({"lr": LR, "layer": layer}, size=SIZE)
    state = hyper.begin({"lr": 0.01, "layer": 0.5})
    twin, start = Twin(2, adam), state.raw
    paths = torch.zeros(2, dtype=torch.float64)
    for row in noise(60, 1):
        signal = (0.2 + row).expand(2)
        alone = twin.step(signal)
        before, state = state.raw, hyper.step(state, signal, hyper.frame())
        paths += (state.raw - before).abs()
        assert float(state.raw[1] - start[1]) == pytest.approx(2 * float(alone[1]), abs=1e-6)
    assert float(paths[0]) < 0.5 * float(paths[1]) / 2
