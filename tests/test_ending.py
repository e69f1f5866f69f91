"""Which weights a run ends with. Truth: the lowest point of a parabola, found on a grid."""

import math

import pytest
import torch

from selftune.ending import Ending, lowest, rise


@pytest.mark.parametrize("start", [-2.0, -0.1, 0.0, 0.5])
@pytest.mark.parametrize("end", [-3.0, -0.1, 0.0, 0.4])
def test_the_end_is_the_lowest_point_of_the_parabola_downhill(start: float, end: float) -> None:
    share = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    heights = start * share + (end - start) * share.square() / 2
    found = lowest(start, end)
    if start < 0:
        assert rise(start, end, found) == pytest.approx(float(heights.min()), abs=1e-7)
    else:  # uphill at first: what lies beyond the ridge is not believed
        assert found == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_slopes_that_are_no_numbers_leave_the_average(bad: float) -> None:
    assert lowest(bad, -1.0) == lowest(-1.0, bad) == lowest(bad, bad) == 0.0


def judged(period: int, total: int, every: int = 20, first: int = 0) -> list[int]:
    """The steps at which a loop that asks so often judges."""
    ending, found = Ending(), []
    for steps in range(first + period, total + 3 * period, period):
        if ending.due(steps, period, total, every):
            ending.judge(steps, -1.0, 1.0)
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
    assert not Ending().due(10, 10, None, 5)


@pytest.mark.parametrize(
    ("then", "error", "good"),
    [(0.70, 0.0, True), (0.80, 0.0, False), (0.70, 0.1, False), (math.nan, 0.0, False)],
)
def test_good_weights_must_beat_the_way(then: float, error: float, good: bool) -> None:
    """The way to the last weights brings 0.25 of a loss of 1: good ones must be below 0.75."""
    ending = Ending()
    ending.judge(1, -1.0, 1.0)
    ending.weigh(1.0, then, error)
    assert ending.good is good


def test_good_weights_replace_what_has_blown_up() -> None:
    ending = Ending()
    ending.judge(1, math.nan, math.nan)
    ending.weigh(math.nan, 1.0, math.nan)
    assert ending.good
    ending.forget()
    assert ending == Ending()
