"""First steps of a rule against late ones, and the rate that a sweep selects. Truth: the steps."""

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import selftune as st
from selftune.control import LRSweep, SweepSettings

RULES = {
    "SGD": st.rules.SGD(), "Adam": st.rules.Adam(), "AdamW": st.rules.AdamW(),
    "RMSprop": st.rules.RMSprop(), "Lion": st.rules.Lion(),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_steps_along_constant_gradients(name: str, step: int) -> None:
    """Truth: the length of the n-th step over that of the 5,000th."""
    rule = RULES[name]
    values = {**rule.defaults, "lr": 1.0}
    grads = torch.full((1,), 0.3, dtype=torch.float64)
    state, lengths = rule.init(grads, values), []
    for age in range(5000):
        moved, state = rule.direction(grads, state, values, age)
        lengths.append(float(moved))
    gain = rule.initial_gain(values, step)
    assert gain == pytest.approx(lengths[step - 1] / lengths[-1], rel=1e-4)


class Slope(nn.Module):
    """A loss that falls linearly, so that every rate descends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def fall(output: Tensor, target: Tensor) -> Tensor:
    return -output.mean()


BATCH = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2)


def loop(rule: str) -> None:
    net = Slope()
    opt = {"SGD": st.SGD, "RMSprop": st.RMSprop}[rule](net, lr=1e-6, total_steps=40, tune=("lr",))
    for _ in range(20):
        opt.zero_grad()
        fall(net(BATCH[0]), BATCH[1]).backward()
        opt.step()


def fit(rule: str) -> None:
    tuner = st.Tuner(
        Slope(), fall, rule=RULES[rule], hparams={"lr": 1e-6}, tune=("lr",), compile=False
    )
    tuner.fit([BATCH] * 20, [BATCH], steps=40, progress=False)


@pytest.mark.parametrize("train", [loop, fit])
def test_steps_after_a_sweep_are_not_longer_than_those_of_it(
    train: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Law: RMSprop's gain exceeds the margin, so its next step is as long as the best one."""
    caplog.set_level(logging.INFO, "selftune")
    selected = {}
    for rule in ("SGD", "RMSprop"):
        train(rule)
        found = re.findall(r"sweep of (\d+) steps, learning rate times (\S+)", caplog.text)
        ((steps, factor),) = found
        assert steps == "16"  # of which the last one is the best
        selected[rule] = float(factor)
        caplog.clear()
    margin = SweepSettings().margin
    assert 0.99 < selected["RMSprop"] / (margin * selected["SGD"]) < 1.01


@pytest.mark.parametrize(("gains", "factor"), [([3.0, 3.0, 1.2], 2.0), ([9.0, 6.0, 4.0], 1.5)])
def test_late_steps_are_shorter_by_the_margin_at_least(gains: list[float], factor: float) -> None:
    """Law: late steps of the second rate, the best, would be 3 or 6 times as short as it was."""
    sweep = LRSweep(steps=4, settings=SweepSettings(interpolation=0.0))
    for slope, gain in zip((-1.0, -9.0, 100.0), gains, strict=True):
        sweep.taken += 1
        sweep.observe(slope, -1.0, gain)
    assert sweep.choice == pytest.approx(factor * sweep.factor(1))


def test_interpolation_compares_steps_with_their_factors() -> None:
    """Closed form: the third step is longer by rate and factor; its slope is 0 at a half of it."""
    sweep = LRSweep(steps=4, settings=SweepSettings(interpolation=1.0))
    for start, slope, gain in ((-1.0, -1.0, 3.0), (-9.0, -8.0, 2.0), (-90.0, 90.0, 1.2)):
        sweep.taken += 1
        sweep.observe(slope, start, gain)
    margin = SweepSettings().margin
    assert sweep.choice == pytest.approx(0.5 * 1.2 * sweep.factor(2) / margin**3)
