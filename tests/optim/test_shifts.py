"""Shifts of an optimizer's hyperparameters. Truths: closed forms, twins, and laws."""

from __future__ import annotations

import copy
import io
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from selftune import rules
from selftune.method import FloorSettings, HyperSettings, WeightDecayFloor
from selftune.optim._shifts import Shifts, TorchProposal
from selftune.penalties import L1
from selftune.schedules import HORIZON
from selftune.update import Update

HPARAMS = Update(rules.SGD(), (L1(),)).hparams
START = dict(lr=0.1, momentum=0.5, weight_decay=1e-2, decay=1e-3, l1=1e-4)


def shifts(
    *names: str, segments: int = 1, groups: list[int] | None = None, **options: Any
) -> Shifts:
    """The named hyperparameters, all segments starting alike."""
    made = Shifts(HPARAMS, tune=names, size=0.05, **options)
    made.lay_out({n: [START[n]] * segments for n in names}, groups or list(range(segments)))
    return made


def step(made: Shifts, signal: Tensor, moving: list[str] | None = None, **options: Any) -> None:
    """A step along hypergradients of all tensors."""
    state = made.hyper.step(
        made.state, made.gather(signal), made.frame(), memory=made.memory,
        moving=made.names if moving is None else moving, propose=made.propose, **options,
    )  # fmt: skip
    made.take(state)


def signal(made: Shifts, **rows: float) -> Tensor:
    return torch.tensor([[rows.get(n, 0.0)] for n in made.names], dtype=torch.float64)


@pytest.mark.parametrize("argument", ["tune", "per", "bounds"])
def test_unknown_names_are_refused(argument: str) -> None:
    """Law: a ValueError that names the argument, the name and what there is."""
    wrong: dict[str, Any] = dict(tune=["rate"], per={"rate": "run"}, bounds={"rate": (0, 1)})
    options = dict(tune=["lr"]) | {argument: wrong[argument]}
    with pytest.raises(ValueError, match=rf"{argument}='rate'.*'lr'"):
        Shifts(HPARAMS, size=0.05, **options)


@pytest.mark.parametrize("per", ["layer", {"lr": "layer"}])
def test_unknown_scopes_are_refused(per: Any) -> None:
    """Law: as above."""
    with pytest.raises(ValueError, match=r"per='layer'.*'tensor'"):
        Shifts(HPARAMS, tune=["lr"], size=0.05, per=per)


def test_names_come_in_one_order() -> None:
    """Truth: the order of the hyperparameters, which is that of the sensitivities."""
    made = shifts("l1", "momentum", "lr")
    assert made.names == made.hyper.names == ["lr", "momentum", "l1"]


def test_a_start_outside_the_bounds_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Law: a warning that names both values."""
    made = Shifts(HPARAMS, tune=["lr"], size=0.05, bounds={"lr": (0.01, 1.0)})
    with caplog.at_level(logging.WARNING, "selftune"):
        made.lay_out({"lr": [5.0]}, [0])
        made.lay_out({"lr": [5.0, 5.0]}, [0, 0], [0, None])
    assert [r.message.split(":")[0] for r in caplog.records] == ["selftune"]
    assert "lr starts at 1, not 5" in caplog.text


@pytest.mark.parametrize("climb", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("slope", [1.0, -1.0])
@pytest.mark.parametrize("per", ["run", "group"])
def test_a_rate_that_may_not_climb_may_fall(slope: float, climb: float, per: str) -> None:
    """Twin: one that is free; penalties move alike in both."""
    free, held = (shifts("lr", "l1", segments=2, per=per) for _ in range(2))
    rows = torch.full((2, 2), slope)
    for _ in range(5):
        step(free, rows)
        step(held, rows, lr_increase_scale=torch.tensor([climb]))
    assert held.value("l1") == free.value("l1") != START["l1"]
    way = math.log(free.value("lr") / START["lr"])
    assert abs(way) > 0.1
    share = climb if slope < 0 else 1.0
    assert math.log(held.value("lr") / START["lr"]) == pytest.approx(share * way)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "l1", "decay"])
def test_each_row_moves_against_its_own_gradient(name: str) -> None:
    """Law: downhill, and the others keep their values."""
    names = ("lr", "momentum", "weight_decay", "l1", "decay")
    made = shifts(*names)
    step(made, signal(made, **{name: -2.0}))
    for other in names:
        assert (made.value(other) > START[other] * 1.005) == (other == name)
        assert made.value(other) >= START[other] * (1 - 1e-12)


def test_only_the_named_ones_move() -> None:
    """Law: a gradient of one that may not move is not looked at."""
    made = shifts("lr", "momentum", "weight_decay")
    step(made, signal(made, lr=1.0, momentum=2.0, weight_decay=1.0), ["lr"])
    assert made.value("weight_decay") == pytest.approx(1e-2, rel=1e-12)
    assert made.value("momentum") == pytest.approx(0.5, rel=1e-12)
    assert made.value("lr") < 0.1


def test_signals_of_segments_are_summed_into_what_shares_a_shift() -> None:
    """Closed form of a plain SGD step: −0.01 times the sum; one shift for each group or tensor."""
    made = shifts(
        "lr", "decay", segments=3, groups=[0, 0, 1], per={"lr": "group", "decay": "tensor"},
        make=lambda raw: torch.optim.SGD(raw, lr=0.01), settings=HyperSettings(apart=1.0),
    )  # fmt: skip
    step(made, torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]))
    assert made.rows["lr"].shift.tolist() == pytest.approx([-0.03, -0.04], rel=1e-12)
    assert made.rows["decay"].shift.tolist() == pytest.approx([-0.01, -0.02, -0.04], rel=1e-12)
    mean = made.state.mean[made.hyper.slots["lr"]]
    assert mean.tolist() == [3.0, 4.0]
    assert made.state.square.tolist() == made.state.mean.square().tolist()


@pytest.mark.parametrize("total", [None, 200, 5000])
def test_weight_decay_does_not_fall_below_what_matters(total: int | None) -> None:
    """Closed form: s = λ · lr/(1 − μ) · T/2, unless the user's bounds say otherwise."""
    names, shrinkage = ("lr", "momentum", "weight_decay"), FloorSettings().l2
    under = WeightDecayFloor(shrinkage=shrinkage, mean=0.5, total_steps=total)
    made = shifts(*names, total_steps=total, floor=under)
    made.memory = 1 / (1 - 0.5)
    for _ in range(150):
        step(made, signal(made, weight_decay=1.0))
    least = shrinkage / (made.value("lr") / 0.5 * (total or HORIZON) / 2)
    assert made.value("weight_decay") == pytest.approx(least, rel=1e-9)
    free = shifts(*names, total_steps=total, floor=under, bounds={"weight_decay": (1e-5, 1.0)})
    for _ in range(150):
        step(free, signal(free, weight_decay=1.0))
    assert free.value("weight_decay") == pytest.approx(1e-5, rel=1e-9)


def started_apart(per: str) -> Shifts:
    """Three groups that start apart, whose decay would fall; one has none."""
    made = Shifts(
        HPARAMS, tune=["lr", "weight_decay"], size=0.05, total_steps=1000,
        floor=WeightDecayFloor(shrinkage=0.3, total_steps=1000),
        per={"lr": "run", "weight_decay": per},
    )  # fmt: skip
    made.lay_out({"lr": [0.1, 0.01, 0.1], "weight_decay": [0.1, 0.2, 0.0]}, [0, 1, 2])
    falls = torch.tensor([[0.0], [1.0]]).expand(2, 1 if made.shared else 3)
    for _ in range(150):
        step(made, falls)
    return made


@pytest.mark.parametrize("per", ["run", "group", "tensor"])
def test_the_floor_is_that_of_the_lowest_decay_at_the_highest_rate(per: str) -> None:
    """Closed form: η λ T over the penalties in use; a penalty with a shift has its own floor."""
    made = started_apart(per)
    rates, decays = (made.rows[n].values() for n in ("lr", "weight_decay"))
    assert float(rates.max() * decays[0] * 1000) == pytest.approx(0.3)
    assert float(decays[1]) == pytest.approx(float(decays[0]) * (2.0 if per == "run" else 1.0))
    assert decays[2] == 0


@pytest.mark.parametrize("per", ["run", "group", "tensor"])
def test_a_decay_that_is_switched_on_later_has_the_given_value(per: str) -> None:
    """Law: what was off has no shift that is not a number."""
    made = started_apart(per)
    assert made.state.raw.isfinite().all()
    made.rows["weight_decay"].rebase([2], 0.05, shown=0.0)
    assert float(made.rows["weight_decay"].values()[2]) == pytest.approx(0.05)


def test_move_adds_in_raw_space_within_bounds() -> None:
    """Closed forms: e^raw for the rate, the bound beyond it, nothing for what is not tuned."""
    made = shifts("lr", bounds={"lr": (1e-3, 1.0)})
    made.move({"lr": math.log(3), "momentum": 1.0})
    assert made.values() == pytest.approx({"lr": 0.3})
    made.move({"lr": 50.0})
    assert made.value("lr") == pytest.approx(1.0)
    step(made, signal(made, lr=1.0))
    assert made.value("lr") < 0.99  # the first gradient inward leaves the bound


def test_forgetting_keeps_the_shifts() -> None:
    """Twin: new shifts from the present values, with Adam and with an optimizer from outside."""
    for make in (None, lambda raw: torch.optim.SGD(raw, lr=0.1, momentum=0.9)):
        made = shifts("lr", make=make)
        for slope in (1.0, 0.5, 0.7):
            step(made, signal(made, lr=slope))
        fresh = Shifts(HPARAMS, tune=["lr"], size=0.05, make=make)
        fresh.lay_out({"lr": [made.value("lr")]}, [0])
        made.forget()
        for slope in (-1.0, -0.5, 0.7):
            step(made, signal(made, lr=slope))
            step(fresh, signal(fresh, lr=slope))
            assert made.value("lr") == pytest.approx(fresh.value("lr"), rel=1e-12)


def adam(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(raw, lr=0.05, betas=(0.8, 0.98))


def rmsprop(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(raw, lr=0.01, momentum=0.5)


def test_adam_from_outside_is_the_methods_own() -> None:
    """Twins: the same steps, whoever takes them."""
    own, outside = shifts("lr", "momentum", "l1"), shifts("lr", "momentum", "l1", make=adam)
    for row in torch.randn(20, 3, 1, generator=torch.Generator().manual_seed(0)) + 0.5:
        step(own, row)
        step(outside, row)
        assert outside.values() == pytest.approx(own.values(), rel=1e-9)


def test_an_optimizer_from_outside_proposes_its_own_steps() -> None:
    """Truth: the same optimizer on a parameter that follows the shifts."""
    raw = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    twin, propose = rmsprop([raw]), TorchProposal(rmsprop, torch.zeros(2, dtype=torch.float64))
    for grads in torch.randn(10, 2, generator=torch.Generator().manual_seed(0)).double():
        before = raw.detach().clone()
        raw.grad = grads.clone()
        twin.step()
        torch.testing.assert_close(propose(before, grads), raw.detach() - before)
        with torch.no_grad():
            raw += 1.0  # whatever becomes of a proposal


@pytest.mark.parametrize("per", ["run", "tensor"])
@pytest.mark.parametrize("make", [None, rmsprop])
def test_state_round_trip_through_a_file(per: str, make: Any) -> None:
    """Law: shifts continued from their state move as the others do, bit for bit."""
    names = ("lr", "momentum", "weight_decay")
    under = WeightDecayFloor(shrinkage=0.03, total_steps=100)
    made, again = (shifts(*names, segments=2, per=per, make=make, floor=under) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(20, 3, 1 if per == "run" else 2, generator=generator) + 0.5
    for row in slopes[:10]:
        step(made, row)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    kept = copy.deepcopy(again.state_dict())
    for row in slopes[10:]:
        step(made, row)
        step(again, row)
    torch.testing.assert_close(again.state_dict(), made.state_dict(), rtol=0, atol=0)
    for name in names:
        assert torch.equal(made.rows[name].values(), again.rows[name].values())
        assert made.value(name) != START[name]
        assert not torch.equal(kept["state"]["raw"], made.state.raw)
