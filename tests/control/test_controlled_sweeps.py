"""The controller during and after a sweep. Truths: the sweep alone, and what losses say of it."""

from __future__ import annotations

import math

import pytest
from controllers import ADAM, VALUES, made, never

from selftune.control import (
    Action,
    Activity,
    Controller,
    Gradient,
    Hypergradient,
    LRSweep,
    Record,
    SweepSlope,
    TrainingLoss,
    ValidationLoss,
)


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
    assert set(action.rewind) == {"lr", "beta1"}
    assert action.rewind["lr"] == pytest.approx(math.log(twin.choice))
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
