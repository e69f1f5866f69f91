"""The arguments ``guard`` and ``probe``. Truths: the policies passed, lengths, and messages."""

from __future__ import annotations

import pytest
from controllers import ADAM

from selftune.control import Guard, GuardPolicy, LRSweep, SweepSettings, make_guard, make_sweep


def test_guards_are_made_of_a_switch_or_a_policy() -> None:
    """Law: the policy that was passed, the usual one, or none.

    Compared as text: from Python 3.13 on, records with NaN are not equal.
    """
    assert make_guard(False) is make_guard(None) is None
    assert repr(make_guard(True)) == repr(Guard())
    policy = GuardPolicy(patience=7)
    assert repr(make_guard(policy)) == repr(Guard(policy=policy))

    class Own:
        def begin(self) -> Guard:
            return Guard(policy=GuardPolicy(limit=3))

    guard = make_guard(Own())
    assert guard is not None
    assert guard.policy.limit == 3


def test_sweeps_are_made_of_a_switch_a_length_or_settings() -> None:
    """Truth: ``SweepSettings.steps``, or the number given; none where the rate is not tuned."""
    assert repr(make_sweep(True, 1000, ADAM)) == repr(LRSweep(steps=50))
    assert repr(make_sweep(True, None, ADAM)) == repr(LRSweep(steps=25))
    assert make_sweep(True, 19, ADAM) is None
    assert repr(make_sweep(33, 79, ADAM)) == repr(LRSweep(steps=33))
    assert make_sweep(False, 1000, ADAM) is make_sweep(0, 1000, ADAM) is None
    settings = SweepSettings(parts=10, decades=2.0)
    own = LRSweep(steps=100, settings=settings)
    assert repr(make_sweep(settings, 1000, ADAM)) == repr(own)
    assert make_sweep(True, 1000, {"weight_decay": ADAM["weight_decay"]}) is None


@pytest.mark.parametrize("probe", [1, -3])
def test_sweeps_that_are_too_short_are_refused(probe: int) -> None:
    """Law: a ValueError that names the argument and its value."""
    with pytest.raises(ValueError, match=f"probe={probe} must be at least 2"):
        make_sweep(probe, 1000, ADAM)
