"""The learning-rate sweep. Truth: gradient descent on quadratics, whose limits are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

import selftune as st
from selftune import rules
from selftune.control import Controller, LRSweep, SweepSettings
from selftune.hparams import Hparam
from selftune.update import Update

SETTINGS = SweepSettings()


def swept(
    sweep: LRSweep, curvatures: list[float], given: float, noise: float = 0.0, starts: bool = False
) -> float:
    """Run the sweep on ½ Σ c w² with gradient noise; returns the rate chosen.

    With ``starts`` it also gets the slopes at the start of the steps.
    """
    c = torch.tensor(curvatures, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    w, moved, start = torch.ones_like(c), torch.zeros_like(c), 0.0
    while True:
        disturbed = noise * torch.randn(len(c), dtype=torch.float64, generator=generator)
        gradient = c * (w + disturbed)
        if sweep.taken:
            sweep.observe(float(gradient @ moved), start)
        if sweep.ended:
            return given * sweep.choice
        moved = -given * sweep.factor(sweep.taken) * gradient
        start = float(gradient @ moved) if starts else 0.0
        w = w + moved
        sweep.taken += 1


GIVEN = [1e-3, 0.02, 0.1, 1.0, 7.0, 300.0]


@pytest.mark.parametrize("curvature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("steps", [30, 50, 100])
def test_finds_the_curvature_whatever_rate_was_given(
    steps: int, given: float, curvature: float
) -> None:
    """Closed form: descent ends at 1/c; found to a factor 3, and never above it."""
    sweep = LRSweep(steps=steps)
    rate = swept(sweep, [curvature], given / curvature)
    assert 1 / 3 < rate * curvature < 1.0
    assert sweep.taken <= steps


@pytest.mark.parametrize("given", [1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("steps", [8, 30, 100])
def test_goes_on_above_its_range_while_the_loss_falls(steps: int, given: float) -> None:
    """Closed form: 1/c = 1, by rates that go on, for as many steps again at most."""
    sweep = LRSweep(steps=steps)
    rate, ratio = swept(sweep, [1.0], given), sweep.factor(1) / sweep.factor(0)
    highest = given * sweep.factor(2 * steps - 1)
    assert min(1.0, highest) / (1.5 * SETTINGS.margin * ratio) < rate < 1.0
    assert steps < sweep.taken <= 2 * steps


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("steps", [8, 12, 25])
def test_short_sweeps_are_as_exact_as_their_ratio(steps: int, given: float) -> None:
    """Closed form: the last of the geometric rates below 1/c, divided by the margin."""
    sweep = LRSweep(steps=steps)
    grid = [given * sweep.factor(t) for t in range(steps)]
    want = max(r for r in grid if r < 1) / SETTINGS.margin
    assert swept(sweep, [1.0], given) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("steps", [8, 12, 25, 100])
@pytest.mark.parametrize("position", [0.0, 0.75, 1.0])
def test_the_rate_is_interpolated(position: float, steps: int, given: float) -> None:
    """Closed form: from the last of the rates below 1/c to 1/c over the squared margin, in logs."""
    sweep = LRSweep(steps=steps, settings=SweepSettings(interpolation=position))
    grid = [given * sweep.factor(t) for t in range(steps)]
    best = max(r for r in grid if r < 0.5)
    higher = max(best, 0.5 / SETTINGS.margin**2)
    want = best ** (1 - position) * higher**position / SETTINGS.margin
    assert swept(sweep, [2.0], given, starts=True) == pytest.approx(want, rel=1e-9)


def test_a_step_that_diverges_is_not_interpolated() -> None:
    """Law: its slope tells nothing of the rates before it."""
    sweep = LRSweep(steps=8)
    for slope in (-1.0, -10.0, -100.0, -1e3, 1e9):
        sweep.taken += 1
        sweep.observe(slope, -abs(slope) if slope < 0 else -1e4)
    assert sweep.ended
    assert sweep.choice == pytest.approx(sweep.factor(3) / SETTINGS.margin)


@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize("given", [1e-2, 1.0, 10.0])
def test_the_stiffest_direction_decides(given: float, steps: int) -> None:
    """Closed form: from 2/max(c) on descent diverges; with gradient noise the choice is below."""
    rate = swept(LRSweep(steps=steps), [10.0, 1.0, 0.1], given, noise=0.05)
    assert 0.02 < rate < 2 / 10


@pytest.mark.parametrize("steps", [2, 8, 25, 100])
@pytest.mark.parametrize("slope", [-1.0, 0.0])
def test_never_longer_than_twice_its_steps(slope: float, steps: int) -> None:
    """Law: it covers its decades on both sides, and goes on above where descent is certain."""
    sweep = LRSweep(steps=steps, settings=SweepSettings(decades=2.0))
    factors = []
    while not sweep.ended:
        factors.append(sweep.factor(sweep.taken))
        sweep.taken += 1
        sweep.observe(slope)
    certain = slope < 0 and steps > 2  # two slopes of a sign may be chance
    assert len(factors) == (2 * steps if certain else steps)
    assert factors[0] == pytest.approx(1e-2)
    assert factors[steps - 1] == pytest.approx(1e2)
    ratios = torch.tensor(factors).log().diff()
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)
    assert sweep.choice == pytest.approx(factors[-1] / SETTINGS.margin if slope else 1.0)


def test_ends_early_where_the_rate_is_plainly_too_high() -> None:
    """Law: on a quadratic the sweep does not go on to overflow."""
    sweep = LRSweep(steps=100)
    swept(sweep, [1.0, 3.0], 100.0)
    assert sweep.taken < 60


def test_a_plateau_that_the_sum_wanders_over_is_not_descent() -> None:
    """Law: of a fall to −1, a rise to −0.8 and a slow fall to −1.2, the first edge counts."""
    sweep = LRSweep(steps=100)
    for step, slope in enumerate([-0.1] * 10 + [0.1] * 2 + [-0.02] * 20, start=1):
        sweep.taken = step
        sweep.observe(slope)
    assert sweep.choice == pytest.approx(sweep.factor(9) / 1.5)
    for step in range(40, 50):
        sweep.taken = step
        sweep.observe(-0.1)
    assert sweep.choice == pytest.approx(sweep.factor(48) / 1.5), "true descent still counts"


def test_a_lucky_batch_far_above_is_not_followed() -> None:
    """Law: in a coarse sweep, past a rate without descent, only as much again counts."""
    sweep = LRSweep(steps=20)
    for step, slope in enumerate([-0.1] * 10 + [0.01, -0.6], start=1):
        sweep.taken = step
        sweep.observe(slope)
    assert sweep.choice == pytest.approx(sweep.factor(9) / 1.5)
    sweep.taken = 13
    sweep.observe(-0.5)
    assert sweep.choice == pytest.approx(sweep.factor(12) / 1.5)


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_what_is_not_finite_ends_it_and_is_not_chosen(slope: float) -> None:
    """Law: the best before stays the choice."""
    sweep = LRSweep(steps=10, taken=5)
    assert sweep.observe(-1.0)
    choice = sweep.choice
    sweep.taken = 6
    assert not sweep.observe(slope)
    assert sweep.ended
    assert sweep.choice == choice == pytest.approx(sweep.factor(4) / 1.5)


@pytest.mark.parametrize(
    ("total", "length"), [(None, 25), (10, 0), (19, 0), (80, 8), (400, 20), (10**6, 100)]
)
def test_length_is_five_percent_within_limits(total: int | None, length: int) -> None:
    """Truth: the arithmetic by hand."""
    assert SETTINGS.steps(total) == length
    with pytest.raises(ValueError, match="probe=1"):
        LRSweep(steps=1)


def hparams(rule: rules.AbstractRule) -> dict[str, Hparam]:
    return Update(rule).hparams


@pytest.mark.parametrize(
    ("beta1", "total", "memory"),
    [(0.9, None, 10.0), (0.9, 300, 3.0), (0.9, 1500, 5.0), (0.9, 6000, 10.0), (0.5, 300, 2.0)],
)
def test_a_memory_of_gradients_is_shortened_to_fit_into_the_run(
    beta1: float, total: int | None, memory: float
) -> None:
    """Closed form: 1/(1 − β₁) is T/300 at most, but 3 at least; −log(1 − β₁) is its raw value."""
    adam = hparams(rules.Adam())
    made = Controller(hparams=adam, total_steps=total, sweep=LRSweep(steps=10, best=3.0))
    moves = made.calmed({"lr": 0.1, "beta1": beta1, "beta2": 0.999}, adam)
    assert set(moves) == {"beta1"}
    assert LRSweep(steps=10, best=3.0).choice == pytest.approx(2.0)
    assert 1 / (1 - beta1) * math.exp(moves["beta1"]) == pytest.approx(memory)


def test_a_momentum_that_makes_steps_longer_stays() -> None:
    """Law: at another momentum the rate that was found would be another step."""
    sgd = hparams(rules.SGD())
    made = Controller(hparams=sgd, total_steps=300, sweep=LRSweep(steps=10))
    assert made.calmed({"lr": 0.1, "momentum": 0.99}, sgd) == {}


def test_state_round_trip_through_json() -> None:
    """Law: a sweep saved half-way ends where the other ends."""
    settings = SweepSettings(decades=3.0)
    sweep, other = LRSweep(steps=20, settings=settings), LRSweep(steps=5, settings=settings)
    for taken, slope in enumerate([-1.0, -2.0, 0.5], start=1):
        sweep.taken = taken
        sweep.observe(slope)
    other.load_state_dict(json.loads(json.dumps(sweep.state_dict())))
    assert other == sweep


def observed(sweep: LRSweep, *steps: tuple[float, float]) -> list[bool]:
    """What a sweep says of steps, as slopes at their start and end."""
    found = []
    for start, end in steps:
        sweep.taken += 1
        found.append(sweep.observe(end, start))
    return found


def growing(count: int) -> list[tuple[float, float]]:
    """Slopes of steps that descend, in proportion to the rate."""
    sweep = LRSweep(steps=25)
    return [(-2.0 * sweep.factor(t), -1.0 * sweep.factor(t)) for t in range(count)]


@pytest.mark.parametrize("wild", [-1e9, 1e9])
def test_a_step_that_ends_far_steeper_than_it_began_has_blown_up(wild: float) -> None:
    """Closed form: the rate before it, whichever way the slope points."""
    sweep = LRSweep(steps=25)
    assert observed(sweep, *growing(8), (-1.0, wild)) == [True] * 8 + [False]
    assert sweep.ended
    assert sweep.choice == pytest.approx(sweep.factor(7) / SETTINGS.margin)


def test_a_sweep_that_blows_up_at_once_begins_anew_far_lower() -> None:
    """Closed form: eight decades, once; then a tenth of the rate that blew it up."""
    sweep = LRSweep(steps=25)
    first = sweep.factor(0)
    assert observed(sweep, (-1.0, -1e9)) == [False]
    assert not sweep.ended
    assert sweep.taken == 0
    assert sweep.factor(0) == pytest.approx(first * 1e-8)
    observed(sweep, (-1.0, 1e9))
    assert sweep.ended
    assert sweep.choice == pytest.approx(first * 1e-8 / 10)


def test_small_batches_are_not_wild() -> None:
    """Law: where single gradients differ a hundredfold, a step that ends steeply is no blow-up."""
    sweep = LRSweep(steps=25)
    generator = torch.Generator().manual_seed(0)
    for taken in range(1, 15):
        sizes = 10 ** torch.empty(2).uniform_(-2, 0, generator=generator)
        sweep.taken = taken
        rate = sweep.factor(taken - 1)
        sweep.observe(-rate * float(sizes[0] * sizes[1]), -rate * float(sizes[0] ** 2))
        assert not sweep.ended


def test_a_descent_far_beyond_its_promise_is_none() -> None:
    """Law: in a bowl slopes get flatter on the way down; where they do not, weights diverged."""
    sweep = LRSweep(steps=25, settings=SweepSettings(interpolation=0.0))
    before = [True] * 3 + [False] * 3
    rising = [(-sweep.factor(t), sweep.factor(t)) for t in range(3, 6)]
    assert observed(sweep, *growing(3), *rising) == before
    best = sweep.best
    assert observed(sweep, (-sweep.factor(6), -50 * sweep.factor(6))) == [False]
    assert sweep.choice == pytest.approx(best / SETTINGS.margin)


@pytest.mark.parametrize(
    "slopes", [[-0.1, -0.1, -0.1, -0.1, 0.7, 0.4, 0.6], [-0.4, -0.1, -0.4, 0.9, -0.4]]
)
def test_two_unlucky_batches_do_not_end_an_uncertain_descent(slopes: list[float]) -> None:
    """Law: below a quarter of its promise, or after three steps, a descent may be chance."""
    sweep = LRSweep(steps=25)
    observed(sweep, *((-sweep.factor(t), s * sweep.factor(t)) for t, s in enumerate(slopes)))
    assert not sweep.ended
    count = len(slopes)
    observed(sweep, *((-sweep.factor(t), -0.6 * sweep.factor(t)) for t in range(count, count + 5)))
    assert sweep.best == pytest.approx(sweep.factor(count + 4))


def test_nearly_all_uphill_is_too_high_however_small_the_slopes() -> None:
    """Closed form: a tenth of the lowest rate; a few more rises than falls are chance."""
    for slopes, choice in (([0.2] * 8, 1e-5), ([0.2, 0.2, -0.01] * 3, 1.0)):
        sweep = LRSweep(steps=len(slopes))
        observed(sweep, *((-sweep.factor(t), s * sweep.factor(t)) for t, s in enumerate(slopes)))
        assert sweep.ended
        assert sweep.choice == pytest.approx(choice)


def test_uphill_all_along_is_far_too_high() -> None:
    """Closed form: a tenth of the lowest rate, instead of the given one."""
    sweep = LRSweep(steps=8)
    lowest = sweep.factor(0)
    observed(sweep, *((-sweep.factor(t), 50 * sweep.factor(t)) for t in range(8)))
    assert sweep.ended
    assert sweep.choice == pytest.approx(lowest / 10)


def test_noise_at_rates_too_small_to_matter_does_not_end_it() -> None:
    """Law: slopes of other batches that are small beside those of the step's own say nothing."""
    sweep = LRSweep(steps=25)
    small = [(-sweep.factor(t), 0.1 * sweep.factor(t) * (-1) ** (t < 4)) for t in range(15)]
    observed(sweep, *small)
    assert not sweep.ended
    observed(sweep, *((-sweep.factor(t), 0.9 * sweep.factor(t)) for t in (15, 16)))
    assert sweep.ended


@pytest.mark.parametrize(("steps", "swept"), [(19, False), (20, True), (64, True), (79, True)])
def test_a_short_run_is_swept_or_says_that_it_is_not(
    steps: int, swept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: a start a thousandfold too low does not end where it began; or a warning is given."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    x = torch.randn(64, 4)
    opt = st.SGD(net.parameters(), lr=1e-5, momentum=0.9, total_steps=steps)
    for step in range(steps):
        opt.zero_grad()
        part = x[8 * (step % 8) :][:8]
        (net(part) - part.sum(1, keepdim=True)).square().mean().backward()
        opt.step()
    assert (opt.hparams["lr"] > 1e-4) == swept
    told = [r.getMessage() for r in caplog.records if "too short" in r.getMessage()]
    assert len(told) == (not swept)


def test_a_sweep_that_has_lost_all_descent_ends() -> None:
    """Law: past the best rate the sum rises slowly, relative to the slopes at the start of steps.

    The loss of a network of sines is bounded in its inner weights: at rates far too high the slopes
    at the end of steps are small beside those at their start, and of either sign.
    """
    sweep = LRSweep(steps=75, settings=SweepSettings(interpolation=0.0))
    descending = [(-sweep.factor(t), -0.8 * sweep.factor(t)) for t in range(38)]
    observed(sweep, *descending)
    best = sweep.best
    observed(sweep, *((-sweep.factor(t), 0.1 * sweep.factor(t)) for t in range(38, 60)))
    assert sweep.ended
    assert sweep.choice == pytest.approx(best / 1.5)


def test_a_descent_far_above_that_the_slopes_do_not_promise_is_not_followed() -> None:
    """Law: it must be a quarter of what the slopes promised, as the descent before it was.

    Weights pushed so far that logits saturate: the loss falls below its first value again, by a
    hundredth of what the slopes at the start of these steps promise.
    """
    sweep = LRSweep(steps=25)
    observed(sweep, *((-sweep.factor(t), -0.8 * sweep.factor(t)) for t in range(17)))
    best, low = sweep.best, -sweep.lowest
    steps = (-2, 1.2), (-4, 0.9), (-8, -2.1), (-100, -0.8), (-15, -1.0)
    observed(sweep, *((start * low, end * low) for start, end in steps))
    assert sweep.change < 2 * sweep.lowest
    assert sweep.best == best
    observed(sweep, (-30 * low, -40 * low))
    assert sweep.best == sweep.factor(sweep.taken - 1), "a descent that they promise still counts"
