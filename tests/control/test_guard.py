"""The guard. Truths: its definitions on sequences made to be judged, and laws of noise."""

import copy
import json
import math

import pytest
import torch

from selftune.guard import Guard


def falling(start: float = 2.0, end: float = 0.5, steps: int = 60) -> list[float]:
    return [end + (start - end) * math.exp(-t / 8) for t in range(steps)]


def noise(steps: int, seed: int) -> list[float]:
    return torch.randn(steps, generator=torch.Generator().manual_seed(seed)).tolist()


def trained() -> Guard:
    guard = Guard()
    assert [guard.loss(x) for x in falling()] == ["ok", "ok", "hold", "ok", "best"] * 12
    return guard


def test_steady_progress_is_best_all_along() -> None:
    """Law: means of a falling sequence fall, the running one and those of fives."""
    guard = trained()
    assert guard.best == guard.mean
    assert 0.5 < guard.best < 0.6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_rolled_back(bad: float) -> None:
    """Law: at once, at the first loss or later, and without a trace in the running mean."""
    guard = trained()
    mean = guard.mean
    assert guard.loss(bad) == "rollback"
    assert guard.mean == mean
    assert Guard().loss(bad) == "rollback"


def test_a_few_bad_gradients_are_skipped() -> None:
    """Law: skipped until ``patience`` in a row; a good one between starts the count anew."""
    guard, bad = Guard(patience=3), math.inf
    verdicts = [guard.gradient(x) for x in (1.0, bad, math.nan, 1.0, bad, bad, bad)]
    assert verdicts == ["ok", "skip", "skip", "ok", "skip", "skip", "rollback"]
    guard.rolled_back(worsened=False)
    assert guard.gradient(bad) == "skip"


def test_a_training_loss_may_rise_but_not_explode() -> None:
    """Closed form: the mean over about ten must exceed twice the first; NaN is tolerated twice."""
    guard = Guard(patience=3)
    assert {guard.training_loss(x) for x in [1.0] * 20 + [1.9] * 100} == {"ok"}
    assert guard.training_loss(2.8) == "ok"  # one batch off is not the mean
    assert guard.training_loss(20.0) == "rollback"
    guard.rolled_back(worsened=False)
    assert guard.training_loss(1.9) == "ok"
    verdicts = [guard.training_loss(x) for x in (math.nan, math.inf, math.nan)]
    assert verdicts == ["skip", "skip", "rollback"]


def test_a_dead_network_is_noticed() -> None:
    """Law: relative to the liveliest so far, so sparse gradients alone are no alarm."""
    guard = Guard(patience=2)
    assert [guard.pulse(s) for s in (0.02, 0.03, 0.02, 0.001, 0.03)] == ["ok"] * 5
    assert [guard.pulse(s) for s in (0.001, 0.0)] == ["ok", "rollback"]


def test_a_network_that_has_learned_is_not_dead() -> None:
    """Law: where the loss has come down, empty gradients are the end of training."""
    for guard in (trained(), Guard(training_first=1.0, training_mean=0.2)):
        assert [guard.pulse(s) for s in (0.5, *[0.0] * 5)] == ["ok"] * 6


@pytest.mark.parametrize("first", [2.0, -2.0])
def test_explosion_from_the_start(first: float) -> None:
    """Closed form: alarm once the mean is above first + |first|, not before."""
    guard = Guard(sigmas=math.inf)
    assert guard.loss(first) == "ok"
    verdicts = []
    while not verdicts or verdicts[-1] != "rollback":
        verdicts.append(guard.loss(first + 1.05 * abs(first)))
        assert (verdicts[-1] == "rollback") == (guard.mean > first + abs(first))
    assert len(verdicts) > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("jump", [0.0, 0.8])
def test_worsening_is_noticed_and_a_noisy_plateau_is_not(jump: float, seed: int) -> None:
    """Law: after progress of 1.5, noise of 0.05 is no alarm in 500 evaluations; 0.8 more is."""
    guard = Guard()
    for x, e in zip(falling(), noise(60, seed), strict=True):
        assert guard.loss(x + 0.05 * e) != "rollback"
    verdicts = [guard.loss(0.5 + jump + 0.05 * e) for e in noise(500, seed + 100)]
    assert ("rollback" in verdicts) == bool(jump)
    if jump:
        assert verdicts.index("rollback") < 20


def test_an_alarm_of_noise_is_not_confirmed() -> None:
    """Law: many batches decide; if they say no, the running mean begins anew."""
    guard = Guard()
    for loss in [2.0] * 3 + [1.0] * 20:
        guard.loss(loss)
    assert guard.confirms(1.5, 1.0)
    assert guard.confirms(math.nan, 1.0, math.nan)
    assert not copy.copy(guard).confirms(1.5, 1.0, 0.25), "nor what may be chance"
    assert guard.confirms(1.5, 1.0, 0.15)
    assert not guard.confirms(1.01, 1.0)
    assert (guard.best, guard.mean) == (1.0, 1.01)
    assert "rollback" not in [guard.loss(1.5) for _ in range(5)], "and so does its patience"
    assert "rollback" in [guard.loss(1.5) for _ in range(30)], "what is known stays known"


def test_a_single_outlier_is_no_alarm() -> None:
    """Law: one evaluation far off raises the noise as well as the mean."""
    guard = trained()
    assert guard.loss(1.5) != "rollback"
    assert [guard.loss(0.5) for _ in range(20)].count("rollback") == 0


def test_cooling_grows_for_blow_ups_in_a_row() -> None:
    """Closed form: 3, 9, 27, … up to the limit; 3 for a loss that worsened; anew after a best."""
    guard = Guard(limit=4)
    guard.loss(1.0)
    factors = [math.exp(guard.rolled_back(worsened=False)) for _ in range(6)]
    assert factors == pytest.approx([3, 9, 27, 81, 81, 81])
    assert math.exp(guard.rolled_back(worsened=True)) == pytest.approx(2)
    guard.loss(0.5)
    assert math.exp(guard.rolled_back(worsened=False)) == pytest.approx(3)
    assert guard.rollbacks == 8


def test_after_a_roll_back_the_good_level_is_no_alarm() -> None:
    """Law: back at the best weights, losses like the best are judged as such."""
    guard = trained()
    while guard.loss(1.4) != "rollback":
        assert guard.count < 100
    guard.rolled_back(worsened=True)
    assert "rollback" not in [guard.loss(guard.best + 0.01) for _ in range(30)]


def test_state_round_trip_through_json() -> None:
    """Law: the judgements to come are the same."""
    guard, other = trained(), Guard()
    guard.training_loss(1.0)
    guard.gradient(math.nan)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other == guard
    to_come = [0.5, 0.7, 1.9, 1.9, 1.9]
    assert [guard.loss(x) for x in to_come] == [other.loss(x) for x in to_come]


@pytest.mark.parametrize("tip", range(38, 43))
def test_good_weights_do_not_lag_behind_the_lowest_loss(tip: int) -> None:
    """A V with its tip at one of 80 losses: the middle of a window of five is within two of it."""
    guard = Guard(sigmas=1e9, tolerance=1e9)
    verdicts = [guard.loss(1.0 + 0.1 * abs(k - tip)) for k in range(80)]
    last = max(k for k, verdict in enumerate(verdicts) if verdict == "best")
    held = max(k for k, verdict in enumerate(verdicts[:last]) if verdict == "hold")
    assert abs(held - tip) <= 2


def test_a_window_begins_anew_after_a_roll_back() -> None:
    """Law: weights from before and after it are not judged together."""
    guard = Guard()
    for loss in (1.0, 1.0, 1.0, 1.0):
        guard.loss(loss)
    guard.rolled_back(worsened=True)
    assert [guard.loss(0.5) for _ in range(5)] == ["ok", "ok", "hold", "ok", "best"]
    assert guard.lowest == 0.5


def test_an_explosion_beside_a_lucky_first_loss_is_not_confirmed() -> None:
    """Law: what is no worse than the good weights has not exploded, nor has what is like it."""
    guard = Guard()
    guard.begin(4.0)
    assert [guard.loss(8.5), guard.exploded] == ["rollback", True]
    assert not guard.confirms(8.4, 8.3, 0.1)
    assert [guard.start, guard.exploded] == [8.3, False]
    for x in noise(300, 0):
        guard.loss(8.3 + 0.5 * x)  # as noise has it, worsened at most
        assert not guard.exploded
    while guard.loss(60.0) != "rollback":
        pass
    assert guard.exploded
    assert guard.confirms(60.0, 8.3, 0.1)


@pytest.mark.parametrize("zero", [0.0, 2.0, 2.5, 100.0])
def test_the_zero_of_training_losses_does_not_matter(zero: float) -> None:
    """Law: losses that differ by a constant are the same training."""
    guard = Guard()
    steady = [2.0 + 0.3 * x - zero for x in noise(500, 1)]
    assert {guard.training_loss(x) for x in steady} == {"ok"}
    blown = [2.0 + 1.5**t - zero for t in range(40)]
    assert "rollback" in {guard.training_loss(x) for x in blown}
