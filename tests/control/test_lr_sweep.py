"""The start-up probe. Truth: gradient descent on quadratics, whose limits are known."""

import json
import math

import pytest
import torch

from selftune.probe import Probe, probe_steps


def sweep(probe: Probe, curvatures: list[float], given: float, noise: float = 0.0) -> float:
    """Run the sweep on ½ Σ c w² with gradient noise; returns the rate chosen."""
    c = torch.tensor(curvatures, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    w, moved = torch.ones_like(c), torch.zeros_like(c)
    while True:
        disturbed = noise * torch.randn(len(c), dtype=torch.float64, generator=generator)
        gradient = c * (w + disturbed)
        if probe.taken:
            probe.observe(float(gradient @ moved))
        if probe.ended:
            return given * probe.choice
        moved = -given * probe.factor(probe.taken) * gradient
        w = w + moved
        probe.taken += 1


GIVEN = [1e-3, 0.02, 0.1, 1.0, 7.0, 300.0]


@pytest.mark.parametrize("curvature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("steps", [30, 50, 100])
def test_finds_the_curvature_whatever_rate_was_given(
    steps: int, given: float, curvature: float
) -> None:
    """Closed form: descent ends at 1/c; found to a factor 3, and never above it."""
    probe = Probe(steps=steps)
    rate = sweep(probe, [curvature], given / curvature)
    assert 1 / 3 < rate * curvature < 1.0
    assert probe.taken <= steps


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("steps", [8, 12, 25])
def test_short_sweeps_are_as_exact_as_their_ratio(steps: int, given: float) -> None:
    """Closed form: the last of the geometric rates below 1/c, divided by the margin."""
    probe = Probe(steps=steps)
    grid = [given * probe.factor(t) for t in range(steps)]
    want = max(r for r in grid if r < 1) / probe.margin
    assert sweep(probe, [1.0], given) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize("given", [1e-2, 1.0, 10.0])
def test_the_stiffest_direction_decides(given: float, steps: int) -> None:
    """Closed form: from 2/max(c) on descent diverges; with gradient noise the choice is below."""
    rate = sweep(Probe(steps=steps), [10.0, 1.0, 0.1], given, noise=0.05)
    assert 0.02 < rate < 2 / 10


@pytest.mark.parametrize("steps", [2, 8, 25, 100])
@pytest.mark.parametrize("slope", [-1.0, 0.0])
def test_never_longer_than_its_steps(slope: float, steps: int) -> None:
    """Law: where descent never ends the sweep does, having covered its decades on both sides."""
    probe = Probe(steps=steps, decades=2.0)
    factors = []
    while not probe.ended:
        factors.append(probe.factor(probe.taken))
        probe.taken += 1
        probe.observe(slope)
    assert len(factors) == steps
    assert factors[0] == pytest.approx(1e-2)
    assert factors[-1] == pytest.approx(1e2)
    ratios = torch.tensor(factors).log().diff()
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)
    assert probe.choice == pytest.approx(1e2 / 1.5 if slope else 1.0)


def test_ends_early_where_the_rate_is_plainly_too_high() -> None:
    """Law: on a quadratic the sweep does not go on to overflow."""
    probe = Probe(steps=100)
    sweep(probe, [1.0, 3.0], 100.0)
    assert probe.taken < 60


def test_a_plateau_that_the_sum_wanders_over_is_not_descent() -> None:
    """Law: of a fall to −1, a rise to −0.8 and a slow fall to −1.2, the first edge counts."""
    probe = Probe(steps=100)
    for step, slope in enumerate([-0.1] * 10 + [0.1] * 2 + [-0.02] * 20, start=1):
        probe.taken = step
        probe.observe(slope)
    assert probe.choice == pytest.approx(probe.factor(9) / 1.5)
    for step in range(40, 50):
        probe.taken = step
        probe.observe(-0.1)
    assert probe.choice == pytest.approx(probe.factor(48) / 1.5), "true descent still counts"


def test_a_lucky_batch_far_above_is_not_followed() -> None:
    """Law: in a coarse sweep, past a rate without descent, only as much again counts."""
    probe = Probe(steps=20)
    for step, slope in enumerate([-0.1] * 10 + [0.01, -0.6], start=1):
        probe.taken = step
        probe.observe(slope)
    assert probe.choice == pytest.approx(probe.factor(9) / 1.5)
    probe.taken = 13
    probe.observe(-0.5)
    assert probe.choice == pytest.approx(probe.factor(12) / 1.5)


def test_a_rate_on_trial_may_lose_half_of_the_descent() -> None:
    """Law: not more, within ten steps; what is not finite is the guard's matter."""
    probe = Probe(steps=10, ended=True, lowest=-1.0)
    assert not probe.settle(0.3, 0.5)
    assert probe.settle(0.3, 0.1)
    assert probe.settling, "the lowered rate is on trial, too"
    assert not probe.settle(math.nan, 0.0)
    for _ in range(9):
        assert probe.settling
        assert not probe.settle(0.0, 0.02)
    assert not probe.settling
    assert not Probe(steps=10, ended=True).settling, "without descent there is nothing to lose"


def test_first_steps_on_trial_may_not_end_far_uphill() -> None:
    """Law: ten times what was found, however steep the way down seemed to be; later ones may."""
    probe = Probe(steps=10, ended=True, lowest=-1.0)
    assert not probe.settle(-50.0, 9.0)
    assert probe.settle(-50.0, 1.5)
    for _ in range(3):
        assert not probe.settle(-50.0, 3.0)
    assert not probe.settle(-50.0, 20.0)


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_what_is_not_finite_ends_it_and_is_not_chosen(slope: float) -> None:
    """Law: the best before stays the choice."""
    probe = Probe(steps=10, taken=5)
    assert probe.observe(-1.0)
    choice = probe.choice
    probe.taken = 6
    assert not probe.observe(slope)
    assert probe.ended
    assert probe.choice == choice == pytest.approx(probe.factor(4) / 1.5)


@pytest.mark.parametrize(
    ("total", "length"), [(None, 25), (10, 0), (79, 0), (80, 8), (400, 20), (10**6, 100)]
)
def test_length_is_five_percent_within_limits(total: int | None, length: int) -> None:
    """Truth: the arithmetic by hand."""
    assert probe_steps(total) == length
    with pytest.raises(ValueError, match="probe=1"):
        Probe(steps=1)


def test_state_round_trip_through_json() -> None:
    """Law: a sweep saved half-way ends where the other ends."""
    probe, other = Probe(steps=20, decades=3.0), Probe(steps=5)
    for taken, slope in enumerate([-1.0, -2.0, 0.5], start=1):
        probe.taken = taken
        probe.observe(slope)
    other.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    assert other == probe
