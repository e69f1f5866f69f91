"""The floor under weight decay. Truths: plain torch runs, closed forms, and a twin that is free."""

import math
from typing import Any

import pytest
import torch

import selftune as st
from selftune import rules
from selftune.floor import HIGHEST, L2_SHRINKAGE, SHRINKAGE, Floor
from selftune.hparams import WEIGHT_DECAY
from selftune.schedules import HORIZON, SHAPES, Schedule
from selftune.tuning import Tuning
from selftune.update import Update

HPARAMS = Update(rules.AdamW()).hparams


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("steps", [150, 4000])
def test_it_shrinks_weights_by_so_much_in_a_run(shape: str, steps: int) -> None:
    """Twin: AdamW of torch without gradients, which does nothing but shrink."""
    schedule = Schedule(shape=shape, total_steps=steps, warmup_steps=10)
    floor = Floor.of(rules.AdamW(), schedule)
    assert floor is not None
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = torch.optim.AdamW([weight], lr=0.02, weight_decay=floor.least(0.02))
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.02 * schedule(step)
        weight.grad = torch.zeros_like(weight)
        opt.step()
    assert -math.log(weight.item()) == pytest.approx(SHRINKAGE, rel=0.03)


@pytest.mark.parametrize(
    ("rule", "shrinkage"),
    [
        (rules.AdamW(), SHRINKAGE), (rules.Lion(), SHRINKAGE), (rules.SGD(), L2_SHRINKAGE),
        (rules.Adam(), None), (rules.RMSprop(), None),
    ],
)  # fmt: skip
def test_rules_that_rescale_decay_have_none(
    rule: rules.AbstractRule, shrinkage: float | None
) -> None:
    """Law: a decay that is divided by the size of gradients shrinks nothing in proportion."""
    floor = Floor.of(rule, Schedule(total_steps=100))
    assert (floor and floor.shrinkage) == shrinkage


def test_a_run_of_unknown_length_is_as_long_as_it_was() -> None:
    """Closed form: the longer it goes on, the less decay shrinks weights by so much."""
    floor = Floor.of(rules.AdamW(), Schedule())
    assert floor is not None
    assert floor.least(0.1, steps=5) == pytest.approx(SHRINKAGE / (0.1 * HORIZON))
    assert floor.least(0.1, steps=8 * HORIZON) == pytest.approx(SHRINKAGE / (0.1 * 8 * HORIZON))


def on_floor(rate: float = 0.01, decay: float = 1e-9, **options: Any) -> Tuning:
    floor = Floor(mean=0.5, total_steps=1000)
    names = ["lr", "weight_decay"]
    made = Tuning(HPARAMS, tune=names, horizon=1000, floor=floor, **options)
    made.lay_out({"lr": [rate], "weight_decay": [decay]}, [0])
    return made


def step(made: Tuning, **rows: float) -> None:
    signal = torch.tensor([[rows.get(n, 0.0)] for n in made.names], dtype=torch.float64)
    made.step(signal, made.names)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_there_decay_follows_the_rate(slope: float) -> None:
    """Closed form: η λ stays where it is, up and down."""
    made = on_floor()
    step(made)
    for _ in range(20):
        step(made, lr=slope)
        shrunk = made.value("lr") * made.value("weight_decay") * 0.5 * 1000
        assert shrunk == pytest.approx(SHRINKAGE, rel=1e-9)
    assert abs(math.log(made.value("lr") / 0.01)) > 0.5


def test_there_the_rate_answers_for_both() -> None:
    """Twin: a rate alone, whose hypergradient is that along a constant η λ."""
    both = on_floor()
    alone = Tuning(HPARAMS, tune=["lr"], horizon=1000)
    alone.lay_out({"lr": [0.01]}, [0])
    step(both)
    step(alone)
    for turn in range(15):
        rate, decay = math.sin(turn), 1.0 + math.cos(turn)  # decay would fall if it could
        step(both, lr=rate, weight_decay=decay)
        step(alone, lr=rate - decay)
        assert both.value("lr") == pytest.approx(alone.value("lr"), rel=1e-9)


def test_decay_leaves_it_at_the_first_call() -> None:
    """Law: it climbs where its hypergradient says so, and then the rate moves without it."""
    made = on_floor()
    step(made)
    floor = made.value("weight_decay")
    for _ in range(3):
        step(made, weight_decay=-1.0)
    assert made.value("weight_decay") > 1.05 * floor
    before = made.value("lr"), made.value("weight_decay")
    made.hyper.reset()  # nothing is left of what led it up
    step(made, lr=1.0)
    assert made.value("lr") < before[0]
    assert made.value("weight_decay") == pytest.approx(before[1], rel=1e-12)


def test_bounds_of_the_user_replace_it() -> None:
    """Law: what the user allows is allowed."""
    made = on_floor(decay=1e-5, bounds={"weight_decay": (1e-6, 1.0)})
    for _ in range(5):
        step(made, weight_decay=1.0)
    assert made.value("weight_decay") < 1e-5


def test_it_ends_far_below_the_upper_bound() -> None:
    """Law: a rate that is next to nothing does not ask for a decay beyond all bounds."""
    made = on_floor(rate=1e-7)
    step(made)
    assert made.value("weight_decay") == pytest.approx(HIGHEST * WEIGHT_DECAY.upper)
    rate = made.value("lr")
    step(made, lr=1.0, weight_decay=5.0)
    assert made.value("lr") < rate  # its own hypergradient's way: they are not tied


@pytest.mark.parametrize("shell", [st.AdamW, st.Lion])
@pytest.mark.parametrize("total", [None, 400])
def test_optimizers_stand_on_it(shell: Any, total: int | None) -> None:
    """Closed form, at the rate where a run has come: decay falls to its floor and no further."""
    weight = torch.nn.Parameter(torch.ones(4))
    opt = shell([weight], lr=0.01, weight_decay=1e-6, tune=("lr", "weight_decay"), probe=False,
                total_steps=total, every=5)  # fmt: skip
    for _ in range(40):
        weight.grad = torch.ones(4)
        opt.step()
        opt.hyper_step(lambda: -weight.sum())
    span = 0.5 * total if total else HORIZON
    shrunk = opt.hparams["lr"] * opt.hparams["weight_decay"] * span
    assert shrunk >= 0.98 * SHRINKAGE
