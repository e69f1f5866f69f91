"""The floor under weight decay. Truths: plain torch runs, closed forms, and a twin that is free."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import selftune as st
from selftune import rules
from selftune.hparams import choose
from selftune.method import FloorSettings, HyperOptimizer, MethodSettings, WeightDecayFloor
from selftune.schedules import HORIZON, SHAPES, Schedule
from selftune.update import Update

HPARAMS = Update(rules.AdamW()).hparams
SETTINGS = FloorSettings()


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("steps", [150, 4000])
def test_it_shrinks_weights_by_so_much_in_a_run(shape: str, steps: int) -> None:
    """Twin: AdamW of torch without gradients, which does nothing but shrink."""
    schedule = Schedule(shape=shape, total_steps=steps, warmup_steps=10)
    floor = WeightDecayFloor.of(rules.AdamW(), schedule, SETTINGS)
    assert floor is not None
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = torch.optim.AdamW([weight], lr=0.02, weight_decay=floor.least(0.02))
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.02 * schedule(step)
        weight.grad = torch.zeros_like(weight)
        opt.step()
    assert -math.log(weight.item()) == pytest.approx(SETTINGS.decoupled, rel=0.03)


@pytest.mark.parametrize(
    ("rule", "shrinkage"),
    [
        (rules.AdamW(), SETTINGS.decoupled), (rules.Lion(), SETTINGS.decoupled),
        (rules.SGD(), SETTINGS.l2), (rules.Adam(), None), (rules.RMSprop(), None),
    ],
)  # fmt: skip
def test_rules_that_rescale_decay_have_none(
    rule: rules.AbstractRule, shrinkage: float | None
) -> None:
    """Law: a decay that is divided by the size of gradients shrinks nothing in proportion."""
    floor = WeightDecayFloor.of(rule, Schedule(total_steps=100), SETTINGS)
    assert (floor and floor.shrinkage) == shrinkage


def test_a_run_of_unknown_length_is_as_long_as_it_was() -> None:
    """Closed form: the longer it goes on, the less decay shrinks weights by so much."""
    floor = WeightDecayFloor.of(rules.AdamW(), Schedule(), SETTINGS)
    assert floor is not None
    assert floor.least(0.1, steps=5) == pytest.approx(SETTINGS.decoupled / (0.1 * HORIZON))
    after = SETTINGS.decoupled / (0.1 * 8 * HORIZON)
    assert floor.least(0.1, steps=8 * HORIZON) == pytest.approx(after)


class Tuned:
    """Hyperparameters that step, with a floor under weight decay where both are tuned."""

    def __init__(self, *names: str, mean: float = 0.5, total: int | None = 1000, **start: float):
        floor = WeightDecayFloor(shrinkage=SETTINGS.decoupled, mean=mean, total_steps=total)
        chosen = choose(HPARAMS, names, None, 1000)
        self.hyper = HyperOptimizer(chosen, size=0.05, floor=floor)
        self.state = self.hyper.begin({"lr": 0.01, "weight_decay": 1e-9, **start})

    def step(self, memory: float = 1.0, steps: int = 0, **rows: float) -> None:
        signal = torch.tensor([rows.get(n, 0.0) for n in self.hyper.names], dtype=torch.float64)
        frame = self.hyper.frame()
        self.state = self.hyper.step(self.state, signal, frame, memory=memory, steps=steps)

    def value(self, name: str) -> float:
        return float(self.hyper.values(self.state.raw)[name])


def on_floor(**start: float) -> Tuned:
    return Tuned("lr", "weight_decay", **start)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_decay_is_never_below_it(slope: float) -> None:
    """Closed form: where the rate falls the floor rises, and takes decay along at once."""
    made = on_floor(lr=0.1)
    made.step()
    for _ in range(20):
        made.step(lr=slope, weight_decay=1.0)  # decay would fall if it could
        shrunk = made.value("lr") * made.value("weight_decay") * 0.5 * 1000
        assert shrunk == pytest.approx(SETTINGS.decoupled, rel=1e-9)
    assert abs(math.log(made.value("lr") / 0.1)) > 0.5


def test_decay_leaves_it_at_the_first_call() -> None:
    """Law: it climbs where its hypergradient says so, and then the rate moves without it."""
    made = on_floor()
    made.step()
    floor = made.value("weight_decay")
    for _ in range(3):
        made.step(weight_decay=-1.0)
    assert made.value("weight_decay") > 1.05 * floor
    before = made.value("lr"), made.value("weight_decay")
    made.state = made.state.forget()  # nothing is left of what led it up
    made.step(lr=1.0)
    assert made.value("lr") < before[0]
    assert made.value("weight_decay") == pytest.approx(before[1], rel=1e-12)


@pytest.mark.parametrize("memory", [1.0, 10.0])
@pytest.mark.parametrize("steps", [100, 5000])
def test_it_counts_momentum_and_the_steps_taken(memory: float, steps: int) -> None:
    """Closed form: s / (η/(1 − μ) T), T the steps taken, and 1000 at least."""
    made = Tuned("lr", "weight_decay", mean=1.0, total=None)
    made.step(memory=memory, steps=steps)
    least = SETTINGS.decoupled / (0.01 * memory * max(HORIZON, steps))
    assert made.value("weight_decay") == pytest.approx(least)


def test_it_has_a_maximum() -> None:
    """Law: a rate that is next to nothing does not ask for a large decay."""
    made = on_floor(lr=1e-7)
    made.step()
    assert made.value("weight_decay") == pytest.approx(SETTINGS.highest)
    rate = made.value("lr")
    made.step(lr=1.0, weight_decay=5.0)
    assert made.value("lr") < rate


def test_decay_that_has_no_hypergradient_stays() -> None:
    """Twin: a rate alone; a training gradient cannot judge decay."""
    both, alone = on_floor(weight_decay=0.06), Tuned("lr")
    for turn in range(10):
        signal = torch.tensor([math.sin(turn), 7.0], dtype=torch.float64)
        frame = both.hyper.frame()
        both.state = both.hyper.step(both.state, signal, frame, moving=["lr"])
        alone.step(lr=math.sin(turn))
    assert both.value("weight_decay") == pytest.approx(0.06)
    assert both.value("lr") == pytest.approx(alone.value("lr"), rel=1e-12)


# in the optimizers


def shrunk(shell: Any, total: int | None = 400, **options: Any) -> float:
    """Σ η_t λ of a run at its end, whose validation loss asks for less decay at every step.

    Relative to the floor's.
    """
    weight = torch.nn.Parameter(torch.ones(4))
    opt = shell([weight], lr=0.01, weight_decay=1e-6, tune=("lr", "weight_decay"), probe=False,
                total_steps=total, every=5, **options)  # fmt: skip
    for _ in range(40):
        weight.grad = torch.ones(4)
        opt.step()
        opt.hyper_step(lambda: -weight.sum())
    span = 0.5 * total if total else HORIZON
    least = min(SETTINGS.highest, SETTINGS.decoupled / (opt.hparams["lr"] * span))
    return opt.hparams["weight_decay"] / least


@pytest.mark.parametrize("shell", [st.AdamW, st.Lion])
@pytest.mark.parametrize("total", [None, 400])
def test_optimizers_stand_on_it(shell: Any, total: int | None) -> None:
    """Closed form, at the rate where a run has come: decay falls to its floor and no further."""
    assert shrunk(shell, total) >= 0.98


@pytest.mark.parametrize(
    "options",
    [
        dict(bounds={"weight_decay": (1e-9, 1.0)}),
        dict(settings=replace(MethodSettings(), floor=None)),
    ],
)
def test_bounds_of_the_user_replace_it(options: dict[str, Any]) -> None:
    """Law: what the user allows is allowed."""
    assert shrunk(st.AdamW, **options) < 0.01
