"""Which weights a run ends with. Truths: parabolas on a grid, and integrals in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from selftune.control import FinalWeights
from selftune.control.final_weights import BACK, between, parabola_minimum, rise

DOWN = torch.tensor([[-1.0, -1.0], [0.5, 0.5]], dtype=torch.float64)  # 1/3 down, 2/3 on


@pytest.mark.parametrize("start", [-2.0, -0.1, 0.0, 0.5])
@pytest.mark.parametrize("end", [-3.0, -0.1, 0.0, 0.4, 2.5])
def test_onward_it_is_the_lowest_point_of_the_parabola(start: float, end: float) -> None:
    share = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    heights = start * share + (end - start) * share.square() / 2
    found = parabola_minimum(start, end)
    if start < 0 and heights[-1] < 0:
        assert rise(start, end, found) == pytest.approx(float(heights.min()), abs=1e-7)
    else:  # uphill at first or as a whole: what lies beyond the ridge is not believed
        assert found == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_slopes_that_are_no_numbers_lead_nowhere(bad: float) -> None:
    assert {parabola_minimum(*ends) for ends in ((bad, -1.0), (-1.0, bad), (bad, bad))} == {0.0}


def slopes(loss: Callable[[Tensor], Tensor], noise: float = 0.0) -> Tensor:
    """Of a loss of the place, at those of the way back, of two batches that differ."""
    places = torch.tensor(BACK, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(places).sum(), places)
    return torch.stack([found + noise, found - noise], dim=1)


@pytest.mark.parametrize("lowest_at", [-1.5, -1.0, -0.8, -0.5, -0.3])
def test_back_it_is_the_position_where_the_loss_is_lowest(lowest_at: float) -> None:
    """The integral is exact for slopes up to the third power (on the odd places, the second)."""
    final = FinalWeights()
    final.judge(7, torch.ones(2, 2), slopes(lambda p: (p - lowest_at).square()))
    best = min(BACK, key=lambda place: (place - lowest_at) ** 2)
    assert final == FinalWeights(position=best, judged=7)


@pytest.mark.parametrize("place", BACK[:-1])
@pytest.mark.parametrize("above", [True, False])
def test_a_position_back_must_beat_the_one_onward(place: float, above: bool) -> None:
    """A parabola that is lowest there, a known depth below the average."""
    depth = (1 / 3 - 0.01) if above else (1 / 3 + 0.01)

    def loss(p: Tensor) -> Tensor:  # a parabola of that depth below the average's
        return depth * (((p - place) / place).square() - 1)

    final = FinalWeights()
    final.judge(1, DOWN, slopes(loss))
    assert final.position == pytest.approx(2 / 3 if above else place)


@pytest.mark.parametrize(
    ("errors", "position"), [(0.1, 0.0), (1.2, 0.0), (1.8, -1.0), (20.0, -1.0)]
)
def test_a_rise_below_one_and_a_half_standard_errors_does_not_count(
    errors: float, position: float
) -> None:
    """Of a slope of 1 along the path: the error of its integral by Simpson's rule, by hand."""
    noise = 1 / (errors * math.sqrt(4**2 + 16**2 + 8**2 + 16**2 + 4**2) / 48)
    final = FinalWeights()
    final.judge(1, torch.ones(2, 2), slopes(lambda p: p, noise))
    assert final.position == position


def test_good_weights_replace_what_has_blown_up() -> None:
    bad = torch.full((2, 2), math.nan)
    back = slopes(lambda p: p)
    back[-1] = math.nan
    final = FinalWeights()
    final.judge(1, bad, back)
    assert final.position == -1.0
    final.judge(1, bad, torch.full((5, 2), math.nan))
    assert final.position == 0.0
    final.forget()
    assert final == FinalWeights()


def test_the_ends_of_a_way_are_whole_whatever_the_other_holds() -> None:
    fine, bad = torch.tensor([1.0, 2.0]), torch.full((2,), math.nan)
    assert torch.equal(between(fine, bad, 0.0), fine)
    assert torch.equal(between(bad, fine, 1.0), fine)
    assert torch.equal(between(fine, 3 * fine, 0.5), 2 * fine)
    assert between(fine, bad, 0.0) is not fine


def judged(period: int, total: int, every: int = 20, first: int = 0) -> list[int]:
    """The steps at which a loop that asks so often judges."""
    final, found = FinalWeights(), []
    for steps in range(first + period, total + 3 * period, period):
        if final.due(steps, period, total, every):
            final.judge(steps, DOWN)
            found.append(steps)
    return found


@pytest.mark.parametrize(
    ("period", "first", "expected"),
    [(1, 0, [99]), (7, 0, [98]), (50, 0, [50, 100]), (50, 20, [70]), (300, 0, [])],
)
def test_a_loop_judges_near_the_end_however_often_it_asks(
    period: int, first: int, expected: list[int]
) -> None:
    assert judged(period, 100, first=first) == expected


def test_a_run_of_unknown_length_has_no_end() -> None:
    assert not FinalWeights().due(10, 10, None, 5)
    assert not FinalWeights(judged=10).over(10, None, 5)


def test_no_step_of_the_hyperparameters_comes_after_the_judgement() -> None:
    """One that comes more than a period before the end still tells."""
    assert FinalWeights(judged=99).over(100, 100, 5)
    assert not FinalWeights(judged=90).over(95, 100, 5)
    assert not FinalWeights().over(100, 100, 5)
    assert not FinalWeights(judged=99).over(101, 100, 5)  # the run goes on


def test_state_round_trip_through_json() -> None:
    """Law: the same end."""
    final, other = FinalWeights(), FinalWeights()
    final.judge(7, DOWN)
    other.load_state_dict(json.loads(json.dumps(final.state_dict())))
    assert other == final
    assert other.position == pytest.approx(2 / 3)
