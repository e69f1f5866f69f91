"""The controller. Truths: the verdicts of its parts, and the moves that follow from roles."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest
from controllers import ADAM, VALUES, made, never

from selftune import rules
from selftune.control import (
    Action,
    Activity,
    Controller,
    FinalWeights,
    Gradient,
    Hypergradient,
    LRSweep,
    SweepSlope,
    TrainingLoss,
    ValidationLoss,
)
from selftune.hparams import Hparam
from selftune.update import Update

SGD = Update(rules.SGD()).hparams
COOL = {"lr": -math.log(3)}


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
            controller.observe(Gradient(True))
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
