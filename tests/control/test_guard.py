"""The guard. Truths: its definitions on sequences made to be judged, and laws of noise."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from selftune.control import Guard, GuardPolicy, TrainingLosses


def falling(start: float = 2.0, end: float = 0.5, steps: int = 60) -> list[float]:
    return [end + (start - end) * math.exp(-t / 8) for t in range(steps)]


def noise(steps: int, seed: int) -> list[float]:
    return torch.randn(steps, generator=torch.Generator().manual_seed(seed)).tolist()


WINDOW = ["ok", "ok", "candidate", "ok", "promote"]


def trained() -> Guard:
    guard = Guard()
    assert [guard.validation_loss(x) for x in falling()] == WINDOW * 12
    return guard


def test_steady_progress_is_best_all_along() -> None:
    """Law: means of a falling sequence fall, the running one and those of fives."""
    guard = trained()
    assert guard.best == guard.mean
    assert 0.5 < guard.best < 0.6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_rewind(bad: float) -> None:
    """Law: at once, at the first loss or later, and without a trace in the running mean."""
    guard = trained()
    mean = guard.mean
    assert guard.validation_loss(bad) == "rewind"
    assert guard.mean == mean
    assert Guard().validation_loss(bad) == "rewind"


@pytest.mark.parametrize("kind", ["gradient", "hypergradient"])
def test_a_few_bad_gradients_are_skipped(kind: str) -> None:
    """Law: skipped until ``patience`` in a row; a good one between starts the count anew."""
    guard = GuardPolicy(patience=3).begin()
    judge = getattr(guard, kind)
    verdicts = [judge(finite) for finite in (True, False, False, True, False, False, False)]
    assert verdicts == ["ok", "skip", "skip", "ok", "skip", "skip", "rewind"]
    guard.rewound(worsened=False)
    assert judge(False) == "skip"


def test_gradients_and_hypergradients_are_counted_apart() -> None:
    """Law: training gradients in between, all of them good, do not make hypergradients good."""
    guard, verdicts = GuardPolicy(patience=3).begin(), []
    for _ in range(3):
        assert guard.gradient(True) == "ok"
        verdicts.append(guard.hypergradient(False))
    assert verdicts == ["skip", "skip", "rewind"]


def test_a_training_loss_may_rise_but_not_explode() -> None:
    """Closed form: the mean over about ten must exceed twice the first; NaN is tolerated twice."""
    guard = GuardPolicy(patience=3).begin()
    assert {guard.training_loss(x) for x in [1.0] * 20 + [1.9] * 100} == {"ok"}
    assert guard.training_loss(2.8) == "ok"  # one batch off is not the mean
    assert guard.training_loss(20.0) == "rewind"
    guard.rewound(worsened=False)
    assert guard.gradient(True) == guard.training_loss(1.9) == "ok"
    verdicts = [guard.training_loss(x) for x in (math.nan, math.inf, math.nan)]
    assert verdicts == ["skip", "skip", "rewind"]


def test_a_dead_network_is_noticed() -> None:
    """Law: relative to the liveliest so far, so sparse gradients alone are no alarm."""
    guard = GuardPolicy(patience=2).begin()
    assert [guard.activity([s]) for s in (0.02, 0.03, 0.02, 0.001, 0.03)] == ["ok"] * 5
    assert [guard.activity([s]) for s in (0.001, 0.0)] == ["ok", "rewind"]


def test_a_network_that_has_learned_is_not_dead() -> None:
    """Law: where the loss has come down, empty gradients are the end of training."""
    for guard in (trained(), Guard(training=TrainingLosses(first=1.0, mean=0.2))):
        assert [guard.activity([s]) for s in (0.5, *[0.0] * 5)] == ["ok"] * 6


def test_units_that_die_under_a_rate_that_has_climbed() -> None:
    """Law: below a share of the most since the fresh start, several times in a row, for that."""
    guard = GuardPolicy(patience=2, capacity=0.8).begin()
    learned = trained()
    learned.policy = guard.policy
    for one in (guard, learned):
        counts = (100.0, 90.0, 79.0, 81.0, 79.0, 78.0)
        assert [one.activity([n], age=500, climb=1.0) for n in counts] == ["ok"] * 5 + ["fade"]
        one.rewound(worsened=False)  # what is left is the measure of the next
        assert [one.activity([n], age=500, climb=1.0) for n in (78.0, 70.0)] == ["ok"] * 2
        assert [one.activity([n], age=500, climb=0.1) for n in (9.0, 8.0, 7.0)] == ["ok"] * 3


def test_a_layer_that_dies_beside_a_wide_one() -> None:
    """Closed form: 0.6 is the harmonic mean of the shares 3/7 and 1, whatever the widths."""
    for wide in (100.0, 1e6):
        guard = GuardPolicy(patience=1, capacity=0.0, bottleneck=0.6).begin()
        assert guard.activity([70.0, wide], age=500, climb=1.0) == "ok"
        assert guard.activity([31.0, wide], age=500, climb=1.0) == "ok"
        assert guard.activity([29.0, wide], age=500, climb=1.0) == "fade"
        guard.rewound(worsened=False)
        for climb in (0.0, 1.0):  # frozen or closed from now on
            assert guard.activity([0.0, wide], age=500, climb=climb) == "ok"
        assert guard.activity([0.0, 0.7 * wide], age=500, climb=1.0) == "ok"
        assert guard.activity([0.0, 0.5 * wide], age=500, climb=1.0) == "fade"


@pytest.mark.parametrize("first", [2.0, -2.0])
def test_explosion_from_the_start(first: float) -> None:
    """Closed form: alarm once the mean is above first + |first|, not before."""
    guard = GuardPolicy(sigmas=math.inf).begin()
    assert guard.validation_loss(first) == "ok"
    verdicts: list[str] = []
    while not verdicts or verdicts[-1] != "rewind":
        verdicts.append(guard.validation_loss(first + 1.05 * abs(first)))
        assert (verdicts[-1] == "rewind") == (guard.mean > first + abs(first))
    assert len(verdicts) > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("jump", [0.0, 0.8])
def test_worsening_is_noticed_and_a_noisy_plateau_is_not(jump: float, seed: int) -> None:
    """Law: after progress of 1.5, 0.8 more is an alarm; noise of 0.05 rarely is, and is refuted."""
    guard = Guard()
    for x, e in zip(falling(), noise(60, seed), strict=True):
        assert guard.validation_loss(x + 0.05 * e) != "rewind"
    verdicts = []
    for e in noise(500, seed + 100):
        verdicts.append(guard.validation_loss(0.5 + jump + 0.05 * e))
        if verdicts[-1] == "rewind" and not jump:
            assert not guard.confirms(0.5, 0.5, 0.005)
    assert verdicts.index("rewind") < 20 if jump else verdicts.count("rewind") <= 3


def test_an_alarm_of_noise_is_not_confirmed() -> None:
    """Law: many batches decide; if they say no, the running mean begins anew."""
    guard = Guard()
    for loss in [2.0] * 3 + [1.0] * 20:
        guard.validation_loss(loss)
    assert guard.confirms(1.5, 1.0)
    assert guard.confirms(math.nan, 1.0, math.nan)
    assert not copy.copy(guard).confirms(1.5, 1.0, 0.25), "nor what may be chance"
    assert guard.confirms(1.5, 1.0, 0.15)
    assert not guard.confirms(1.01, 1.0)
    assert (guard.best, guard.mean) == (1.0, 1.01)
    verdicts = [guard.validation_loss(1.5) for _ in range(5)]
    assert "rewind" not in verdicts, "and so does its patience"
    verdicts = [guard.validation_loss(1.5) for _ in range(30)]
    assert "rewind" in verdicts, "what is known stays known"


def test_a_single_outlier_is_no_alarm() -> None:
    """Law: one evaluation far off raises the noise as well as the mean."""
    guard = trained()
    assert guard.validation_loss(1.5) != "rewind"
    assert "rewind" not in [guard.validation_loss(0.5) for _ in range(20)]


def test_cooling_grows_for_blow_ups_in_a_row() -> None:
    """Closed form: 3, 9, 27, … up to the limit; 2 for a loss that worsened; anew after a best."""
    guard = GuardPolicy(limit=4).begin()
    guard.validation_loss(1.0)
    factors = [math.exp(guard.rewound(worsened=False)) for _ in range(6)]
    assert factors == pytest.approx([3, 9, 27, 81, 81, 81])
    assert math.exp(guard.rewound(worsened=True)) == pytest.approx(2)
    for _ in range(guard.policy.recent):
        guard.validation_loss(0.5)
    assert math.exp(guard.rewound(worsened=False)) == pytest.approx(3)
    assert guard.rewinds == 8


def test_after_a_rewind_the_good_level_is_no_alarm() -> None:
    """Law: back at the best weights, losses like the best are judged as such."""
    guard = trained()
    while guard.validation_loss(1.4) != "rewind":
        assert guard.count < 100
    guard.rewound(worsened=True)
    assert "rewind" not in [guard.validation_loss(guard.best + 0.01) for _ in range(30)]


def test_state_round_trip_through_json() -> None:
    """Law: the judgements to come are the same."""
    guard, other = trained(), Guard()
    guard.sweeping_loss(1.0)
    guard.training_loss(1.0)
    guard.gradient(False)
    guard.hypergradient(False)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other == guard
    to_come = [0.5, 0.7, 1.9, 1.9, 1.9]
    verdicts = [[g.validation_loss(x) for x in to_come] for g in (guard, other)]
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("tip", range(38, 43))
def test_good_weights_do_not_lag_behind_the_lowest_loss(tip: int) -> None:
    """A V with its tip at one of 80 losses: the middle of a window of five is within two of it."""
    guard = GuardPolicy(sigmas=1e9, tolerance=1e9).begin()
    verdicts = [guard.validation_loss(1.0 + 0.1 * abs(k - tip)) for k in range(80)]
    promoted = max(k for k, verdict in enumerate(verdicts) if verdict == "promote")
    held = max(k for k, verdict in enumerate(verdicts[:promoted]) if verdict == "candidate")
    assert abs(held - tip) <= 2


def test_a_window_begins_anew_after_a_rewind() -> None:
    """Law: weights from before and after it are not judged together."""
    guard = Guard()
    for loss in (1.0, 1.0, 1.0, 1.0):
        guard.validation_loss(loss)
    guard.rewound(worsened=True)
    assert [guard.validation_loss(0.5) for _ in range(5)] == WINDOW
    assert guard.good.lowest == 0.5


def test_an_explosion_beside_a_lucky_first_loss_is_not_confirmed() -> None:
    """Law: what is no worse than the good weights has not exploded, nor has what is like it."""
    guard = Guard()
    guard.begin(4.0)
    assert [guard.validation_loss(8.5), guard.exploded] == ["rewind", True]
    assert not guard.confirms(8.4, 8.3, 0.1)
    assert [guard.start, guard.exploded] == [8.3, False]
    for x in noise(300, 0):
        guard.validation_loss(8.3 + 0.5 * x)  # as noise has it, worsened at most
        assert not guard.exploded
    while guard.validation_loss(60.0) != "rewind":
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
    assert "rewind" in {guard.training_loss(x) for x in blown}


@pytest.mark.parametrize(("horizon", "count"), [(10, 8), (400, 8), (1000, 20), (10**6, 50)])
def test_alarms_are_judged_by_more_batches_in_longer_runs(horizon: int, count: int) -> None:
    """The arithmetic by hand: one for fifty steps, from 8 to 50."""
    assert GuardPolicy().batches(horizon) == count


def test_the_zero_of_a_training_loss_is_arbitrary_after_a_sweep_too() -> None:
    """Law: losses that scatter about 0 are measured by their scatter, not by what they are."""
    guard = Guard()
    assert not any(guard.sweeping_loss(x) for x in (0.001, -0.3, 0.2))
    assert {guard.training_loss(x) for x in (0.4, 0.8, 0.5, 0.9, 0.7)} == {"ok"}
    other = Guard()
    assert not any(other.sweeping_loss(x) for x in (2.0, 2.3, 2.2))
    assert other.training_loss(40.0) == "rewind"


def test_nothing_above_the_start_is_ever_good() -> None:
    """Law: also where rewinds in a row have had the first loss measured anew."""
    guard = Guard()
    guard.begin(1.0)
    for _ in range(guard.policy.limit):
        assert guard.validation_loss(1e6) == "rewind"
        guard.rewound(worsened=False)
    assert guard.stuck
    verdicts = {guard.validation_loss(1e3 - k) for k in range(20)}
    assert "promote" not in verdicts
    assert guard.stuck
    found = [guard.validation_loss(0.5) for _ in range(120)]
    assert "promote" in found
    assert not guard.stuck


def test_an_unlucky_batch_after_a_rewind_is_no_explosion() -> None:
    """Law: of losses of small batches one may be three times the first; their mean is not."""
    guard = Guard()
    for loss in (1.0, 2.0, 1.5):
        guard.sweeping_loss(loss)
    other = copy.deepcopy(guard)
    assert [other.training_loss(4.5) for _ in range(3)] == ["ok", "ok", "rewind"]
    for _ in range(4):
        assert {guard.training_loss(x) for x in (4.5, 1.0, 1.5)} == {"ok"}
        guard.rewound(worsened=False)


@pytest.mark.parametrize("seed", range(5))
def test_losses_that_scatter_over_decades_are_no_explosions(seed: int) -> None:
    """Law: of weights that never change, by single examples, after three lucky ones."""
    guard, rewinds = Guard(), 0
    for loss in (0.8, 0.6, 0.9):
        guard.sweeping_loss(loss)
    for normal in noise(300, seed):
        if guard.training_loss(10 ** (1 + normal)) == "rewind":
            guard.rewound(worsened=False)
            rewinds += 1
    assert rewinds <= 7  # more than 100 if only the lucky ones are the reference


def test_an_explosion_after_a_rewind_is_one() -> None:
    """Law: the first loss is that of the good weights, the next that of a step too far."""
    guard = Guard()
    for loss in (1.0, 2.0, 1.5):
        guard.sweeping_loss(loss)
    for _ in range(3):
        assert guard.training_loss(100.0) == "rewind"
        guard.rewound(worsened=False)
        assert guard.training_loss(1.5) == "ok"


def test_a_lucky_window_while_losses_rise_does_not_replace_good_weights() -> None:
    """Law: the mean of ten has risen by many errors, so five low losses in a row are luck."""
    guard = Guard()
    for loss in [*falling(end=0.23, steps=30), *[0.13, 0.33] * 10]:
        assert guard.validation_loss(loss) != "rewind"
    lowest = guard.good.lowest
    rising, lucky = [0.33, 0.43, 0.33, 0.43, 0.33], [0.25, 0.2, 0.15, 0.2, 0.25]
    found = [guard.validation_loss(x) for x in (*rising, *lucky)]
    assert found == ["ok", "ok", "candidate", "ok", "ok"] * 2
    assert guard.good.lowest == lowest > 0.2


def test_gradients_that_are_not_finite_at_the_good_weights_are_skipped() -> None:
    """Law: after a rewind without a finite gradient, the learning rate is not the cause."""
    guard = GuardPolicy(patience=2).begin()
    assert [guard.gradient(False) for _ in range(2)] == ["skip", "rewind"]
    guard.rewound(worsened=False)
    assert {guard.gradient(False) for _ in range(9)} == {"skip"}
    assert {guard.training_loss(math.nan) for _ in range(9)} == {"skip"}
    assert [guard.gradient(f) for f in (True, False, False)] == ["ok", "skip", "rewind"]
