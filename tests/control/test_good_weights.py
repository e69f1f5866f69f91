"""Which averaged weights are good. Truths: the mean with triangular weights, and its laws."""

from __future__ import annotations

import statistics

import pytest

from selftune.control import GoodWeights, GuardPolicy

CANDIDATE = ["ok", "ok", "candidate", "ok", "promote"]
LATEST = ["ok", "ok", "ok", "ok", "average"]


def judged(losses: list[float], *, candidates: bool = True) -> list[str]:
    good = GoodWeights(candidates=candidates)
    return [good.observe(loss) for loss in losses]


@pytest.mark.parametrize(("window", "shares"), [(3, (1, 2, 1)), (5, (1, 2, 3, 2, 1))])
def test_the_candidate_is_judged_by_a_triangular_mean(window: int, shares: tuple[int]) -> None:
    """Closed form."""
    losses = [3.0, 1.0, 0.5, 0.7, 2.0][:window]
    good = GuardPolicy(window=window).begin().good
    verdicts = [good.observe(loss) for loss in losses]
    assert verdicts[window // 2] == "candidate"
    assert verdicts[-1] == "promote"
    mean = sum(w * loss for w, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert good.lowest == pytest.approx(mean)


def test_a_steep_fall_is_not_worse_than_the_rise_after_it() -> None:
    """Law: a plain mean prefers the rise, whose middle loss is higher."""
    fall, rise = [2.0, 1.2, 0.7, 0.55, 0.5], [0.6, 0.7, 0.9, 1.2, 1.5]
    assert statistics.fmean(rise) < statistics.fmean(fall)
    assert judged(fall + rise) == [*CANDIDATE, *CANDIDATE[:4], "ok"]


def test_without_a_candidate_weights_of_a_rising_loss_are_not_good() -> None:
    """Law: the latest weights of a window are stored, and where losses rise they are the worst."""
    assert judged([1.0, 0.5, 0.8, 1.5, 2.5], candidates=False) == ["ok"] * 5
    assert judged([2.5, 1.5, 0.8, 0.5, 1.0], candidates=False) == LATEST


def test_a_model_that_grows_loses_its_candidate_and_the_window_restarts() -> None:
    """Law: no window has losses of both kinds, and no promotion lacks its candidate."""
    good = GoodWeights()
    assert [good.observe(1.0) for _ in range(3)] == CANDIDATE[:3]
    good.hold(False)
    assert [good.observe(1.0) for _ in range(5)] == LATEST


def test_no_weights_above_the_bar_or_with_dying_units_are_good() -> None:
    """Law: whatever their loss is."""
    good = GoodWeights()
    assert "promote" not in [good.observe(1.0, bar=0.9) for _ in range(5)]
    assert "promote" not in [good.observe(1.0, rejected=True) for _ in range(5)]
    assert [good.observe(1.0, bar=1.1) for _ in range(5)] == CANDIDATE
