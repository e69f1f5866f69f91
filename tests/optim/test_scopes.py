"""The shifts of one hyperparameter in each scope. Truths: closed forms, autograd, and laws."""

from __future__ import annotations

import math

import pytest
import torch

from selftune.bijections import Memory
from selftune.hparams import DECAY, LR, MOMENTUM, WEIGHT_DECAY, Hparam, penalty_hparam
from selftune.optim._shifts import Scoped
from selftune.rules.adam import BETA1


def laid_out(
    hparam: Hparam, values: list[float], groups: list[int] | None = None, scope: str = "run"
) -> Scoped:
    tuned = Scoped(hparam, scope)
    tuned.lay_out(values, list(range(len(values))) if groups is None else groups)
    return tuned


@pytest.mark.parametrize("hparam", [LR, DECAY, WEIGHT_DECAY, MOMENTUM, BETA1, penalty_hparam("l1")])
def test_all_zero_starts_from_zero(hparam: Hparam) -> None:
    """Truth: ``from_zero``, which lies within the bounds and has a slope."""
    tuned = laid_out(hparam, [0.0, 0.0])
    if hparam.role not in ("rate", "decay"):
        assert tuned.values().tolist() == [0.0, 0.0]
        assert not tuned.slopes().any()
        assert tuned.wake()
    assert not tuned.wake()
    assert hparam.lower <= hparam.from_zero <= hparam.upper
    assert tuned.values().tolist() == pytest.approx([hparam.from_zero] * 2, rel=1e-12)
    assert (tuned.slopes() > 0).all()


@pytest.mark.parametrize("scope", ["run", "group", "tensor"])
def test_zero_beside_others_stays_exactly_zero(scope: str) -> None:
    """Law: no shift wakes a segment that is off, and it has no slope."""
    tuned = laid_out(WEIGHT_DECAY, [0.0, 0.1, 0.0], [0, 1, 1], scope)
    tuned.shift = torch.full_like(tuned.shift, 2.0)
    assert tuned.values().tolist() == pytest.approx([0.0, 0.1 * math.exp(2), 0.0], rel=1e-12, abs=0)
    assert tuned.slopes()[[0, 2]].tolist() == [0.0, 0.0]


def test_one_shift_keeps_ratios_of_rates_and_of_memories() -> None:
    """Closed form: Log multiplies all values by e^shift, Memory all 1/(1 − μ)."""
    rates = laid_out(LR, [0.1, 0.01, 0.1])
    rates.shift += 0.7
    torch.testing.assert_close(
        rates.values(), math.exp(0.7) * torch.tensor([0.1, 0.01, 0.1], dtype=torch.float64)
    )
    momenta = laid_out(MOMENTUM, [0.9, 0.5])
    momenta.shift += 0.7
    memories = 1 / (1 - momenta.values())
    want = math.exp(0.7) * torch.tensor([10.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(memories, want)


SCOPES = [("run", [0, 0, 0, 0], 1), ("group", [0, 1, 1, 2], 3), ("tensor", [0, 1, 2, 3], 4)]


@pytest.mark.parametrize(("scope", "slots", "count"), SCOPES)
def test_scopes_share_shifts_and_gather_is_their_derivative(
    scope: str, slots: list[int], count: int
) -> None:
    """Truth: autograd of Σ signal · value in the shifts equals gather(signal · slopes)."""
    tuned = laid_out(MOMENTUM, [0.9, 0.5, 0.0, 0.1], [0, 1, 1, 2], scope)
    assert tuned.slots.tolist() == slots
    shift, signal = (torch.randn(n, dtype=torch.float64) for n in (count, 4))
    on, moving = torch.tensor([0, 1, 3]), shift.clone().requires_grad_()
    values = Memory().forward(tuned.base[on] + moving[tuned.slots[on]])
    (want,) = torch.autograd.grad(signal[on] @ values, moving)
    tuned.shift = shift
    torch.testing.assert_close(tuned.gather(signal * tuned.slopes()), want)


@pytest.mark.parametrize("scope", ["run", "group", "tensor"])
def test_rebase_sets_some_segments_and_no_others(scope: str) -> None:
    """Law: the value set from outside is held at the present shift; 0 turns it off."""
    tuned = laid_out(LR, [0.1, 0.2, 0.0], [0, 0, 1], scope)
    tuned.shift = torch.full_like(tuned.shift, -0.4)
    before = tuned.values()
    tuned.rebase([1], 0.03, shown=float(before[1]))
    tuned.rebase([2], 0.03, shown=0.0)
    assert tuned.values().tolist() == pytest.approx([float(before[0]), 0.03, 0.03], rel=1e-12)
    tuned.rebase([0], 0.0, shown=float(before[0]))
    assert tuned.values()[0] == 0
    assert tuned.slopes()[0] == 0


def test_lay_out_again_keeps_what_was_tuned() -> None:
    """Law: old slots keep their shifts, new ones start from the mean of these."""
    tuned = laid_out(LR, [0.1, 0.2], [0, 1], "group")
    tuned.shift = torch.tensor([0.5, -0.1], dtype=torch.float64)
    tuned.lay_out([0.1, 0.2, 0.3], [0, 1, 2], [0, 1, None])
    assert tuned.shift.tolist() == pytest.approx([0.5, -0.1, 0.2])


@pytest.mark.parametrize(("shift", "edge"), [(9.0, [1.0, 0.1]), (-9.0, [0.1, 0.01])])
def test_clamp_stops_at_the_first_bound_and_keeps_the_ratio(
    shift: float, edge: list[float]
) -> None:
    """Closed form: the larger value stops at ``upper``, the smaller at ``lower``; 10 : 1 stays."""
    tuned = laid_out(LR.bounded(0.01, 1.0), [0.5, 0.05, 0.0])
    tuned.shift += shift
    tuned.clamp()
    assert tuned.values().tolist() == pytest.approx([*edge, 0.0], rel=1e-12)


def test_a_start_outside_the_bounds_is_brought_in() -> None:
    """Closed form: the bound itself."""
    assert float(laid_out(LR.bounded(0.01, 1.0), [5.0]).values()) == pytest.approx(1.0)
    assert float(laid_out(LR.bounded(0.01, 1.0), [0.0]).values()) == pytest.approx(0.01)
