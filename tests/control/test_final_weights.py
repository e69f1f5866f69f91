"""Which weights a run ends with. Truths: parabolas on a grid, and integrals in closed form."""

import math

import pytest
import torch
from torch import Tensor

from selftune.ending import BACK, Ending, between, lowest, rise

DOWN = torch.tensor([[-1.0, -1.0], [0.5, 0.5]], dtype=torch.float64)  # 1/3 down, 2/3 on


@pytest.mark.parametrize("start", [-2.0, -0.1, 0.0, 0.5])
@pytest.mark.parametrize("end", [-3.0, -0.1, 0.0, 0.4, 2.5])
def test_onward_it_is_the_lowest_point_of_the_parabola(start: float, end: float) -> None:
    share = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    heights = start * share + (end - start) * share.square() / 2
    found = lowest(start, end)
    if start < 0 and heights[-1] < 0:
        assert rise(start, end, found) == pytest.approx(float(heights.min()), abs=1e-7)
    else:  # uphill at first or as a whole: what lies beyond the ridge is not believed
        assert found == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_slopes_that_are_no_numbers_lead_nowhere(bad: float) -> None:
    assert lowest(bad, -1.0) == lowest(-1.0, bad) == lowest(bad, bad) == 0.0


def slopes(loss, noise: float = 0.0) -> Tensor:
    """Of a loss of the place, at those of the way back, of two batches that differ."""
    places = torch.tensor(BACK, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(places).sum(), places)
    return torch.stack([found + noise, found - noise], dim=1)


@pytest.mark.parametrize("lowest_at", [-1.5, -1.0, -0.8, -0.5, -0.3])
def test_back_it_is_the_place_where_the_loss_is_lowest(lowest_at: float) -> None:
    """The integral is exact for slopes up to the third power (on the odd places, the second)."""
    ending = Ending()
    ending.judge(7, torch.ones(2, 2), slopes(lambda p: (p - lowest_at).square()))
    best = min(BACK, key=lambda place: (place - lowest_at) ** 2)
    assert ending == Ending(onward=best, judged=7)


@pytest.mark.parametrize("place", BACK[:-1])
@pytest.mark.parametrize("above", [True, False])
def test_a_place_back_must_beat_the_end_onward(place: float, above: bool) -> None:
    """A parabola that is lowest there, a known depth below the average."""
    depth = (1 / 3 - 0.01) if above else (1 / 3 + 0.01)

    def loss(p: Tensor) -> Tensor:  # a parabola of that depth below the average's
        return depth * (((p - place) / place).square() - 1)

    ending = Ending()
    ending.judge(1, DOWN, slopes(loss))
    assert ending.onward == pytest.approx(2 / 3 if above else place)


@pytest.mark.parametrize(("noise", "onward"), [(0.1, -1.0), (3.0, 0.0)])
def test_a_rise_less_than_its_error_is_not_believed(noise: float, onward: float) -> None:
    ending = Ending()
    ending.judge(1, torch.ones(2, 2), slopes(lambda p: p, noise))
    assert ending.onward == onward


def test_good_weights_replace_what_has_blown_up() -> None:
    bad = torch.full((2, 2), math.nan)
    back = slopes(lambda p: p)
    back[-1] = math.nan
    ending = Ending()
    ending.judge(1, bad, back)
    assert ending.onward == -1.0
    ending.judge(1, bad, torch.full((5, 2), math.nan))
    assert ending.onward == 0.0
    ending.forget()
    assert ending == Ending()


def test_the_ends_of_a_way_are_whole_whatever_the_other_holds() -> None:
    fine, bad = torch.tensor([1.0, 2.0]), torch.full((2,), math.nan)
    assert torch.equal(between(fine, bad, 0.0), fine)
    assert torch.equal(between(bad, fine, 1.0), fine)
    assert torch.equal(between(fine, 3 * fine, 0.5), 2 * fine)
    assert between(fine, bad, 0.0) is not fine


def judged(period: int, total: int, every: int = 20, first: int = 0) -> list[int]:
    """The steps at which a loop that asks so often judges."""
    ending, found = Ending(), []
    for steps in range(first + period, total + 3 * period, period):
        if ending.due(steps, period, total, every):
            ending.judge(steps, DOWN)
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
    assert not Ending(judged=10).over(10, None, 5)


def test_no_step_of_the_hyperparameters_comes_after_the_judgement() -> None:
    """One that comes more than a period before the end still tells."""
    assert Ending(judged=99).over(100, 100, 5)
    assert not Ending(judged=90).over(95, 100, 5)
    assert not Ending().over(100, 100, 5)
    assert not Ending(judged=99).over(101, 100, 5)  # the run goes on
