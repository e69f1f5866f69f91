"""All hyperparameters together. Truths: closed forms, a twin that tunes one alone, and laws."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from selftune import rules
from selftune.floor import L2_SHRINKAGE, Floor
from selftune.penalties import L1
from selftune.tuning import HORIZON, Tuning
from selftune.update import Update

HPARAMS = Update(rules.SGD(), (L1(),)).hparams
START = dict(lr=0.1, momentum=0.5, weight_decay=1e-2, decay=1e-3, l1=1e-4)


def tuning(
    *names: str, segments: int = 1, groups: list[int] | None = None, **options: Any
) -> Tuning:
    """A tuning of the named hyperparameters, all segments starting alike."""
    made = Tuning(HPARAMS, tune=names, **options)
    made.lay_out({n: [START[n]] * segments for n in names}, groups or list(range(segments)))
    return made


def value(made: Tuning, name: str) -> float:
    return float(made.rows[name].values()[0])


def signal(made: Tuning, **rows: float) -> Tensor:
    return torch.tensor([[rows.get(n, 0.0)] for n in made.names], dtype=torch.float64)


@pytest.mark.parametrize("argument", ["tune", "per", "bounds"])
def test_unknown_names_are_refused(argument: str) -> None:
    """Law: a ValueError that names the argument, the name and what there is."""
    wrong: dict[str, Any] = dict(tune=["rate"], per={"rate": "run"}, bounds={"rate": (0, 1)})
    options = dict(tune=["lr"]) | {argument: wrong[argument]}
    with pytest.raises(ValueError, match=rf"{argument}='rate'.*'lr'"):
        Tuning(HPARAMS, **options)


@pytest.mark.parametrize("per", ["layer", {"lr": "layer"}])
def test_unknown_scopes_are_refused(per: Any) -> None:
    """Law: as above."""
    with pytest.raises(ValueError, match=r"per='layer'.*'tensor'"):
        Tuning(HPARAMS, tune=["lr"], per=per)


def test_names_come_in_one_order() -> None:
    """Truth: the order of the hyperparameters, which is that of the tangents."""
    assert tuning("l1", "momentum", "lr").names == ["lr", "momentum", "l1"]


@pytest.mark.parametrize("climb", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_rate_that_may_not_climb_may_fall(slope: float, climb: float) -> None:
    """Twin: a tuning that is free; penalties move alike in both."""
    free, held = tuning("lr", "l1"), tuning("lr", "l1")
    for _ in range(5):
        free.step(signal(free, lr=slope, l1=slope), ["lr", "l1"])
        held.step(signal(held, lr=slope, l1=slope), ["lr", "l1"], climb=climb)
    assert value(held, "l1") == value(free, "l1") != START["l1"]
    way = math.log(value(free, "lr") / START["lr"])
    assert abs(way) > 0.1
    share = climb if slope < 0 else 1.0
    assert math.log(value(held, "lr") / START["lr"]) == pytest.approx(share * way)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_momentum_moves_at_constant_effective_rate(slope: float) -> None:
    """Closed form: lr/(1 − μ) stays where only momentum has a gradient."""
    made = tuning("lr", "momentum")
    before = value(made, "lr") / (1 - value(made, "momentum"))
    for _ in range(20):
        made.step(signal(made, momentum=slope), made.names)
    assert abs(value(made, "momentum") - 0.5) > 0.02
    assert value(made, "lr") / (1 - value(made, "momentum")) == pytest.approx(before, rel=1e-9)


def test_effective_rate_moves_as_lr_alone_would() -> None:
    """Twin: a tuning of lr only; and where lr/(1 − μ) is all that matters momentum stays."""
    made, alone = tuning("lr", "momentum"), tuning("lr")
    for step in range(20):
        slope = 1.0 + math.sin(step)
        # the loss depends on log lr − log(1 − μ) only, and −log(1 − μ) is momentum's raw value
        rows = dict(lr=slope, momentum=slope)
        made.step(signal(made, **rows), made.names)
        alone.step(signal(alone, lr=slope), ["lr"])
    assert value(made, "momentum") == pytest.approx(0.5, rel=1e-9)
    assert value(made, "lr") == pytest.approx(value(alone, "lr"), rel=1e-9)
    assert value(made, "lr") < 0.08


@pytest.mark.parametrize("name", ["lr", "weight_decay", "l1", "decay"])
def test_each_row_moves_against_its_own_gradient(name: str) -> None:
    """Law: downhill, and the others keep their values."""
    names = ("lr", "weight_decay", "l1", "decay")
    made = tuning(*names)
    made.step(signal(made, **{name: -2.0}), made.names)
    for other in names:
        assert (value(made, other) > START[other] * 1.01) == (other == name)
        assert value(made, other) >= START[other] * (1 - 1e-12)


def test_only_the_named_ones_move() -> None:
    """Law: a gradient of one that may not move is not looked at."""
    made = tuning("lr", "weight_decay")
    made.step(signal(made, lr=1.0, weight_decay=1.0), ["lr"])
    assert value(made, "weight_decay") == pytest.approx(1e-2, rel=1e-12)
    assert value(made, "lr") < 0.1


def test_signals_of_segments_are_summed_into_what_shares_a_shift() -> None:
    """Closed form of a plain SGD step: −0.01 times the sum; one shift for each group or tensor."""
    made = tuning(
        "lr", "decay", segments=3, groups=[0, 0, 1], per={"lr": "group", "decay": "tensor"},
        make=lambda raw: torch.optim.SGD(raw, lr=0.01),
    )  # fmt: skip
    made.step(torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]), made.names)
    assert made.rows["lr"].shift.tolist() == pytest.approx([-0.03, -0.04], rel=1e-12)
    assert made.rows["decay"].shift.tolist() == pytest.approx([-0.01, -0.02, -0.04], rel=1e-12)
    mean, snr = made.signals()["lr"]
    assert (mean.tolist(), snr.tolist()) == ([3.0, 4.0], [1.0, 1.0])


@pytest.mark.parametrize("horizon", [None, 200, 5000])
def test_weight_decay_does_not_fall_below_what_matters(horizon: int | None) -> None:
    """Closed form: s = λ · lr/(1 − μ) · T/2, unless the user's bounds say otherwise."""
    names = ("lr", "momentum", "weight_decay")
    under = Floor(shrinkage=L2_SHRINKAGE, mean=0.5, total_steps=horizon)
    made = tuning(*names, horizon=horizon, floor=under)
    made.memory = 1 / (1 - 0.5)
    for _ in range(150):
        made.step(signal(made, weight_decay=1.0), made.names)
    floor = L2_SHRINKAGE / (value(made, "lr") / 0.5 * (horizon or HORIZON) / 2)
    assert value(made, "weight_decay") == pytest.approx(floor, rel=1e-9)
    free = tuning(*names, horizon=horizon, floor=under, bounds={"weight_decay": (1e-5, 1.0)})
    for _ in range(150):
        free.step(signal(free, weight_decay=1.0), free.names)
    assert value(free, "weight_decay") == pytest.approx(1e-5, rel=1e-9)


def test_move_adds_in_raw_space_within_bounds() -> None:
    """Closed forms: e^raw for the rate, the bound beyond it, nothing for what is not tuned."""
    made = tuning("lr", bounds={"lr": (1e-3, 1.0)})
    made.move("lr", math.log(3))
    made.move("momentum", 1.0)
    assert value(made, "lr") == pytest.approx(0.3)
    made.move("lr", 50.0)
    assert value(made, "lr") == pytest.approx(1.0)
    made.step(signal(made, lr=1.0), ["lr"])
    assert value(made, "lr") < 0.99  # the first gradient inward leaves the bound


@pytest.mark.parametrize("per", ["run", "tensor"])
def test_state_round_trip(per: str) -> None:
    """Law: a tuning continued from its state moves as the other does, bit for bit."""
    names = ("lr", "momentum", "weight_decay")
    made, again = (tuning(*names, segments=2, per=per) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(20, 3, 1 if per == "run" else 2, generator=generator) + 0.5
    for step in slopes[:10]:
        made.step(step, names)
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for step in slopes[10:]:
        made.step(step, names)
        again.step(step, names)
    for name in names:
        assert torch.equal(made.rows[name].values(), again.rows[name].values())
        assert value(made, name) != START[name]
