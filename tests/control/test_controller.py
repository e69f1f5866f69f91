"""The controller. Truths: the verdicts of its parts, and the moves that follow from roles."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest

from selftune import rules
from selftune.control import (
    Action,
    Activity,
    Controller,
    FinalWeights,
    Gradient,
    Guard,
    GuardPolicy,
    Hypergradient,
    LRSweep,
    Record,
    SweepSettings,
    SweepSlope,
    TrainingLoss,
    ValidationLoss,
    make_guard,
    make_sweep,
)
from selftune.hparams import Hparam
from selftune.update import Update

ADAM = Update(rules.Adam()).hparams
SGD = Update(rules.SGD()).hparams
VALUES = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "decay": 0.0, "weight_decay": 0.0}
COOL = {"lr": -math.log(3)}


def never() -> tuple[float, ...]:
    raise AssertionError("nothing to compare")


def made(
    hparams: Mapping[str, Hparam] = ADAM, sweep: LRSweep | None = None, **policy: Any
) -> Controller:
    return Controller(
        hparams=hparams, total_steps=300, sweep=sweep, guard=GuardPolicy(**policy).begin()
    )


def bad(patience: int, **options: Any) -> list[Action]:
    """What follows from so many gradients in a row that are not finite."""
    controller = made(patience=patience, **options)
    return [controller.observe(Gradient(False)) for _ in range(patience)]


def test_an_action_asks_for_nothing_by_default() -> None:
    """Law: good news changes nothing."""
    controller = made()
    news = [
        Gradient(True), Activity([100.0]), TrainingLoss(1.0), ValidationLoss(1.0, never),
        Hypergradient(True),
    ]  # fmt: skip
    assert [controller.observe(record) for record in news] == [Action()] * 5
    assert Action() == (False, "", None, "", False)


# the sweep


def test_the_sweep_keeps_its_best_iterate_and_ends_where_it_was() -> None:
    """Twin: the sweep alone; after it, raw values move by what it says, with no reason to log."""
    twin, controller = LRSweep(steps=8), made(sweep=LRSweep(steps=8))
    assert controller.sweeping
    slopes = [-1.0, -2.0, -3.0, -1.0, 9.0, 9.0]
    for taken, slope in enumerate(slopes, start=1):
        twin.taken = controller.sweep.taken = taken
        lowest = twin.observe(slope)
        action = controller.observe(SweepSlope(slope, VALUES))
        assert action.snapshot == ("iterate" if lowest else "")
        assert (action.rewind is not None) == twin.ended == (taken == len(slopes))
        assert not action.skip
        assert not action.reason
    assert not controller.sweeping
    assert action.rewind == twin.moves(VALUES, ADAM, 300)
    assert action.rewind["lr"] == pytest.approx(math.log(twin.factor(3) / 1.5))
    assert action.rewind["beta1"] == pytest.approx(math.log(0.1 * 3))


def unproven(**policy: float) -> Controller:
    """A controller whose sweep has ended with weights of its own."""
    controller = made(sweep=LRSweep(steps=2), **policy)
    controller.guard.begin(1.0)
    controller.observe(TrainingLoss(1.0))
    for taken in (1, 2):
        controller.sweep.taken = taken
        controller.observe(SweepSlope(-1.0, VALUES))
    assert controller.unproven
    return controller


@pytest.mark.parametrize(("loss", "lost"), [(1.05, False), (1.2, True), (7e3, True)])
def test_a_validation_loss_proves_a_sweep_or_takes_it_back(loss: float, lost: bool) -> None:
    """Law: a tenth more than at the start, which is good until then, is noise."""
    controller = unproven()
    action = controller.observe(ValidationLoss(loss, never))
    assert not controller.unproven
    assert action.snapshot == ""
    assert (action.rewind is not None) == lost
    assert controller.observe(ValidationLoss(0.9, never)).rewind is None


def test_weights_are_good_as_soon_as_a_loss_proves_the_sweep() -> None:
    """Law: they are no worse than the start, which was good."""
    controller = unproven()
    assert controller.observe(ValidationLoss(0.99, never)) == Action(snapshot="average")


def test_training_losses_prove_a_sweep_or_take_it_back() -> None:
    """Law: ten of them without an alarm; one far above the first is an alarm."""
    controller = unproven()
    for _ in range(10):
        assert controller.observe(TrainingLoss(0.9)) == Action()
        assert controller.unproven
    assert controller.observe(TrainingLoss(0.9)) == Action(snapshot="average")
    assert not controller.unproven
    controller = unproven()
    action = controller.observe(TrainingLoss(50.0))
    assert action.snapshot == ""
    assert action.rewind is not None


def test_a_training_loss_ends_a_sweep() -> None:
    """Law: at the step that follows; the best rate so far stands."""
    controller = made(sweep=LRSweep(steps=8))
    for taken in range(1, 6):
        controller.sweep.taken = taken
        assert controller.observe(TrainingLoss(1.0)) == Action()
        assert controller.observe(SweepSlope(-1.0, VALUES)).snapshot == "iterate"
    best = controller.sweep.best
    assert controller.observe(TrainingLoss(30.0)) == Action()
    controller.sweep.taken = 6
    action = controller.observe(SweepSlope(-1.0, VALUES))
    assert action.rewind["lr"] == pytest.approx(math.log(best / 1.5))
    assert not controller.sweeping


def test_a_sweep_is_observed_without_a_guard_and_nothing_else_is() -> None:
    """Law: ``guard=None`` takes nothing back, and copies weights in the sweep alone."""
    controller = Controller(hparams=ADAM, sweep=LRSweep(steps=2))
    controller.sweep.taken = 1
    assert controller.observe(SweepSlope(-1.0, VALUES)) == Action(snapshot="iterate")
    controller.sweep.taken = 2
    last = controller.observe(SweepSlope(-1.0, VALUES))
    assert last.snapshot == "iterate"
    assert last.rewind is not None
    assert not controller.sweeping
    bad_news: list[Record] = [
        Gradient(False), Activity([0.0]), TrainingLoss(math.nan),
        ValidationLoss(math.nan, never), Hypergradient(False),
    ]  # fmt: skip
    for record in bad_news * 20:
        assert controller.observe(record) == Action()


# the guard


@pytest.mark.parametrize("kind", [Gradient, Hypergradient])
def test_gradients_that_are_not_finite_are_skipped_then_taken_back(kind: Any) -> None:
    """Law: tolerated ``patience`` times in a row."""
    controller = made(patience=3)
    found = [controller.observe(kind(False)) for _ in range(3)]
    assert found[:2] == [Action(skip=True)] * 2
    assert found[2].skip
    assert found[2].rewind is not None
    assert "finite" in found[2].reason


def test_a_dead_network_is_taken_back() -> None:
    """Law: a network none of whose weights has a gradient any more."""
    controller = made(patience=2)
    found = [controller.observe(Activity([alive])) for alive in (100.0, 0.0, 0.0)]
    assert found[:2] == [Action()] * 2
    assert found[2].rewind is not None
    assert "vanished" in found[2].reason


@pytest.mark.parametrize("climb", [0.5, 5.0])
def test_units_that_die_cool_the_rate_but_not_below_the_given_one(climb: float) -> None:
    """Law: at the given rate they were alive."""
    controller = made(patience=2)
    found = [controller.observe(Activity([n], 500, climb)) for n in (100.0, 10.0, 10.0)]
    assert found[:2] == [Action()] * 2
    assert found[2].rewind is not None
    assert found[2].rewind["lr"] == pytest.approx(-min(climb, math.log(3.0)))
    assert "units died" in found[2].reason


def test_a_training_loss_that_explodes_is_taken_back() -> None:
    """Law: at once; one that is no number as often as gradients are."""
    controller = made()
    for _ in range(10):
        assert controller.observe(TrainingLoss(1.0)) == Action()
    action = controller.observe(TrainingLoss(100.0))
    assert action.rewind is not None
    assert "training loss exploded" in action.reason
    assert action.diverged
    assert made().observe(TrainingLoss(math.nan)) == Action(skip=True)


def test_weights_become_good_ones_at_the_end_of_a_window() -> None:
    """Twin: the guard alone, whose window is of five losses."""
    controller = made()
    found = [controller.observe(ValidationLoss(1.0 - 0.01 * k, never)) for k in range(10)]
    window = ["", "", "candidate", "", "promote"]
    assert found == [Action(snapshot=kind) for kind in window * 2]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_no_number_is_taken_back_unasked(loss: float) -> None:
    """Law: no other batches are looked at; it cools as an explosion does."""
    action = made().observe(ValidationLoss(loss, never))
    assert action.skip
    assert "exploded" in action.reason
    assert action.rewind is not None
    assert set(action.rewind) == {"lr"}


def worsened(now: float, good: float) -> tuple[Action, int]:
    """What follows from losses that worsen after a fall, and how often batches are compared."""
    controller, asked = made(), []

    def compare() -> tuple[float, float]:
        asked.append(1)
        return now, good

    for loss in [2.0] * 3 + [1.0] * 20:
        controller.observe(ValidationLoss(loss, compare))
    for _ in range(30):
        action = controller.observe(ValidationLoss(1.5, compare))
        if asked:
            break
    return action, len(asked)


def test_a_validation_loss_that_worsens_is_taken_back_if_many_batches_agree() -> None:
    """Law: the rate is halved and momenta stay; where batches disagree nothing happens."""
    action, asked = worsened(1.5, 1.0)
    assert asked == 1
    assert action.rewind == pytest.approx({"lr": -math.log(2)})
    assert action.reason == "the validation loss has worsened, to 1.5"
    assert worsened(1.0, 1.0) == (Action(), 1)


@pytest.mark.parametrize(
    ("hparams", "momenta"), [(ADAM, set()), (SGD, {"momentum"}), ({"lr": ADAM["lr"]}, set())]
)
def test_what_blew_up_goes_on_cooler_and_with_less_momentum(
    hparams: Mapping[str, Hparam], momenta: set[str]
) -> None:
    """Law: hyperparameters move by their roles, whatever they are called.

    A momentum that averages gradients, such as β₁, does not make steps longer, so it stays.
    """
    action = bad(1, hparams=hparams, momentum=-0.5)[0]
    assert action.rewind == pytest.approx(COOL | dict.fromkeys(momenta, -0.5))
    renamed = {f"{n}/other": h for n, h in hparams.items()}
    action = bad(1, hparams=renamed, momentum=-0.5)[0]
    assert action.rewind == pytest.approx(COOL | {f"{n}/other": -0.5 for n in momenta})


def test_a_sweep_after_which_units_are_dead_is_undone() -> None:
    """Law: at the given rate they were live, so a lower loss does not confirm the sweep."""
    sweep = LRSweep(steps=2)
    controller = made(sweep=sweep)
    assert controller.observe(Activity([100.0])) == Action()
    sweep.ended, sweep.proven = True, False
    for age in (8, 16, 24):
        lower = controller.observe(ValidationLoss(1.0 / age, never))
        assert lower.snapshot in ("", "candidate")
        assert controller.unproven
        action = controller.observe(Activity([60.0], age, climb=2.0))
    assert action.rewind == pytest.approx({"lr": -math.log(3)})
    for age in (8, 16, 24):  # at the initial weights again, so the reference is the same
        action = controller.observe(Activity([69.0], age, climb=0.9))
    assert action.rewind == pytest.approx({"lr": -0.9}), "not below the given rate"
    for age in (8, 16, 24):
        assert controller.observe(Activity([71.0], age, climb=0.9)).rewind is None


def test_units_that_die_after_the_sweep_is_confirmed_are_missed() -> None:
    """Law: the reference is the count of the weights that confirmed it, not the next one."""
    sweep = LRSweep(steps=2)
    controller = made(sweep=sweep)
    controller.observe(Activity([100.0]))
    sweep.ended, sweep.proven = True, False
    controller.observe(Activity([80.0], 16, climb=2.0))
    assert controller.guard is not None
    controller.guard.begin(2.0)  # the loss of the initial weights
    assert controller.observe(ValidationLoss(1.0, never)).snapshot == "average"
    for age, alive in ((24, 57.0), (32, 55.0), (40, 50.0)):
        assert controller.observe(Activity([alive], age, climb=2.0)).rewind is None
    assert controller.observe(Activity([50.0], 48, climb=2.0)).rewind is not None


def test_a_count_right_after_the_sweep_does_not_confirm_it() -> None:
    """Law: neither training nor validation losses confirm before units could have died."""
    sweep = LRSweep(steps=2)
    controller = made(sweep=sweep)
    controller.observe(Activity([100.0]))
    sweep.ended, sweep.proven = True, False
    assert controller.guard is not None
    controller.guard.begin(2.0)  # the loss of the initial weights
    controller.observe(Activity([90.0], 8, climb=2.0))
    for _ in range(15):
        assert controller.observe(TrainingLoss(1.0)) == Action()
    assert controller.observe(ValidationLoss(1.0, never)).snapshot != "average"
    assert controller.unproven
    for age in (16, 24, 32):
        action = controller.observe(Activity([5.0], age, climb=2.0))
    assert action.rewind is not None, "back to the initial weights"
    assert not action.diverged, "a sweep that is undone says nothing of later rates"
    assert controller.guard.units.spared == [100.0]


# the log


def test_a_rewind_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Law: the first is logged as a warning, later ones as information; nothing else is logged."""
    controller = made(patience=1)
    with caplog.at_level(logging.INFO, "selftune"):
        controller.announce(Action(skip=True), 1)
        controller.announce(Action(rewind={"lr": 1.0}), 1)  # part of the plan: the end of a sweep
        assert not caplog.records
        for step in (7, 8):
            controller.announce(controller.observe(Gradient(False)), step)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "step 7: gradients vanished or are not finite; back to" in caplog.messages[0]
    assert caplog.messages[0].endswith("learning rate divided by 3")
    assert caplog.messages[1].endswith("learning rate divided by 9")


def test_a_rewind_where_the_rate_is_not_tuned_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Law: nothing is divided."""
    controller = made({"weight_decay": ADAM["weight_decay"]}, patience=1)
    controller.announce(controller.observe(Gradient(False)), 7)
    assert caplog.messages[0].endswith("learning rate unchanged, since it is not tuned")


# saving


def test_state_round_trip_through_json() -> None:
    """Law: the decisions to come are the same; without a saved sweep it is over."""
    mine, other = (made(sweep=LRSweep(steps=8)) for _ in range(2))
    mine.sweep.taken = 1
    for record in (SweepSlope(-1.0, VALUES), TrainingLoss(1.0), Hypergradient(False)):
        mine.observe(record)
    mine.final.position, mine.final.judged = 0.5, 9
    saved = json.dumps(mine.state_dict())
    assert saved != json.dumps(other.state_dict())
    state = json.loads(saved)
    other.load_state_dict(state)
    assert json.dumps(other.state_dict()) == saved
    other.load_state_dict(state | {"sweep": None})
    assert not other.sweeping
    without = Controller(hparams=ADAM)
    without.load_state_dict(state)
    assert without.final == FinalWeights(position=0.5, judged=9)
    other.load_state_dict(json.loads(json.dumps(without.state_dict())))
    assert other.guard.skipped_hyper == 1, "a state without a guard leaves it as it is"


# what users pass


def test_guards_are_made_of_a_switch_or_a_policy() -> None:
    """Law: the policy that was passed, the usual one, or none."""
    assert make_guard(False) is make_guard(None) is None
    assert make_guard(True) == Guard()
    policy = GuardPolicy(patience=7)
    assert make_guard(policy) == Guard(policy=policy)

    class Own:
        def begin(self) -> Guard:
            return Guard(policy=GuardPolicy(limit=3))

    guard = make_guard(Own())
    assert guard is not None
    assert guard.policy.limit == 3


@pytest.mark.parametrize("guard", ["yes", 1, 0.5])
def test_other_guards_are_refused(guard: Any) -> None:
    """Law: a TypeError that says what is right."""
    with pytest.raises(TypeError, match=r"guard=.* must be True, False or a policy"):
        make_guard(guard)


def test_sweeps_are_made_of_a_switch_a_length_or_settings() -> None:
    """Truth: ``SweepSettings.steps``, or the number given; none where the rate is not tuned."""
    assert make_sweep(True, 1000, ADAM) == LRSweep(steps=50)
    assert make_sweep(True, None, ADAM) == LRSweep(steps=25)
    assert make_sweep(True, 19, ADAM) is None
    assert make_sweep(33, 79, ADAM) == LRSweep(steps=33)
    assert make_sweep(False, 1000, ADAM) is make_sweep(0, 1000, ADAM) is None
    settings = SweepSettings(parts=10, decades=2.0)
    assert make_sweep(settings, 1000, ADAM) == LRSweep(steps=100, settings=settings)
    assert make_sweep(True, 1000, {"weight_decay": ADAM["weight_decay"]}) is None


@pytest.mark.parametrize("probe", [1, -3])
def test_sweeps_that_are_too_short_are_refused(probe: int) -> None:
    """Law: a ValueError that names the argument and its value."""
    with pytest.raises(ValueError, match=f"probe={probe} must be at least 2"):
        make_sweep(probe, 1000, ADAM)
