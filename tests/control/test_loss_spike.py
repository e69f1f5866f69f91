"""The alarm for a lasting spike of the loss. Truths: its definition, and laws of noise."""

from __future__ import annotations

import math

import pytest
import torch

from selftune.control import GuardPolicy, LossSpike


def descent(steps: int) -> list[float]:
    """Losses from 1 to 0.5 with a time constant of five losses."""
    return [0.5 + 0.5 * math.exp(-t / 5) for t in range(steps)]


def alarm(losses: list[float], policy: GuardPolicy | None = None) -> int | None:
    """Index of the first loss at which a guard raises an alarm."""
    guard = (policy or GuardPolicy()).begin()
    verdicts = [guard.validation_loss(loss) for loss in losses]
    return verdicts.index("rewind") if "rewind" in verdicts else None


@pytest.mark.parametrize(("level", "found"), [(1.0, 14), (0.85, 14), (0.7, None)])
def test_a_collapse_is_an_alarm_at_the_third_loss(level: float, found: int | None) -> None:
    """Closed form: the third loss above the lowest mean of three by half of the descent."""
    losses = [*descent(12), *[level] * 3]
    assert alarm(losses) == found


def test_the_mean_of_ten_losses_finds_a_collapse_later() -> None:
    """Ablation: without this alarm, the collapse in the test above is found after 6 or more."""
    found = alarm([*descent(12), *[1.0] * 20], GuardPolicy(spike=1e9))
    assert found is not None
    assert found >= 18


def test_the_spike_itself_does_not_count_as_noise() -> None:
    """Closed form: differences of 0.1 and one of 0.4; with the latter, 4σ exceeds the rise."""
    assert alarm([1.0, 0.9, 0.8, 0.7, 0.6, 1.0, 1.0, 1.0]) == 7


def test_one_or_two_high_losses_are_no_spike() -> None:
    """Law: an unlucky batch, or two, are not three."""
    assert alarm([*descent(12), 1.0, 1.0, *descent(12)[-3:], 1.0, 0.55, 0.54]) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_noise_is_no_spike(scale: float) -> None:
    """Law: of 100 runs of 30 losses without a trend, few have three so high; at any scale."""
    random = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(100):
        noise = (scale * (1 + torch.randn(30, generator=random))).tolist()
        spike, found = LossSpike(), False
        for n in range(5, 30):
            recent = noise[max(0, n - 9) : n + 1]
            found |= spike.observe(recent, noise[0], share=0.5, sigmas=4.0, least=0.0)
        alarms += found
    assert alarms <= 10


def test_a_descent_does_not_count_as_noise() -> None:
    """Closed form: ten losses of slope d have σ² = d²/2 by their differences, else 8.25 d²."""
    recent = [1.0 - 0.1 * t for t in range(7)] + [1.0] * 3
    assert LossSpike(low=0.5).observe(recent, 1.0, share=0.5, sigmas=4.0, least=0.02)
