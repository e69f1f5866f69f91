"""Steps of the hyperparameters of rules. Truths: torch's Adam beside them, autograd, and laws."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from twins import SETTINGS, SIZE, Ours, Twin, adam, free, noise, vector

from selftune import rules
from selftune.hparams import LR, choose
from selftune.method import Frame, HyperOptimizer, HyperSettings, HyperState, WeightDecayFloor
from selftune.method.hyper_optimizer import trust
from selftune.penalties import L1
from selftune.update import Update

SHRINKAGE, TOTAL = 0.3, 500


class Case(NamedTuple):
    rule: rules.AbstractRule
    values: dict[str, float]


CASES = [
    Case(rules.SGD(), dict(lr=0.01, decay=1e-4, momentum=0.9, weight_decay=1e-4, l1=1e-5)),
    Case(rules.AdamW(), dict(lr=1e-3, decay=1e-5, beta1=0.9, weight_decay=1e-2)),
    Case(rules.AdamW(), dict(lr=1e-2, weight_decay=1.0)),
    Case(rules.Lion(), dict(lr=1e-8, weight_decay=1.0)),
    Case(rules.Adam(), dict(lr=1e-3, weight_decay=0.0)),
]


def made(case: Case, floor: WeightDecayFloor | None = None) -> tuple[HyperOptimizer, HyperState]:
    known = Update(case.rule, (L1(1e-4),)).hparams
    hyper = HyperOptimizer(choose(known, tuple(case.values), None, TOTAL), size=SIZE, floor=floor)
    return hyper, hyper.begin(case.values)


def by_hand(
    hyper: HyperOptimizer, before: HyperState, after: HyperState, signal: Tensor, alone: Twin
) -> Tensor:
    """Raw values after a step, from torch's Adam and the laws of pace, bounds and floor."""
    at = {name: i for i, name in enumerate(hyper.names)}
    values, (low, high) = hyper.values(before.raw), hyper.frame()[1:]
    memory = 1 / (1 - values["momentum"]) if "momentum" in at else 1.0
    start = alone.raw.detach().clone()
    change = (alone.step(signal) - start) * trust(after.mean, after.square, SETTINGS)
    change = change * vector(*[h.pace for h in hyper.hparams.values()])
    raw = (before.raw + change.clamp(-0.3, 0.3)).maximum(low).minimum(high)
    least = SHRINKAGE / (raw[at["lr"]].exp() * memory * TOTAL)  # at the rate after the step
    decay = at["weight_decay"]
    raw[decay] = raw[decay].maximum(least.clamp(max=0.1).log())  # its maximum
    return raw


@pytest.mark.parametrize("case", CASES, ids=lambda c: type(c.rule).__name__)
@pytest.mark.parametrize("seed", range(4))
def test_steps_written_out(case: Case, seed: int) -> None:
    """Truth: torch's Adam on the same hypergradients, and the laws of a step; decay may climb."""
    hyper, state = made(case, WeightDecayFloor(shrinkage=SHRINKAGE, total_steps=TOTAL))
    alone, count = Twin(len(case.values), adam), len(case.values)
    drift, kicks = noise(1, count, seed=seed)[0], noise(60, count, seed=seed + 9)
    for kick in kicks:
        memory = 1 / (1 - hyper.values(state.raw).get("momentum", torch.zeros(())))
        after = hyper.step(state, drift + kick, hyper.frame(), memory=memory)
        want = by_hand(hyper, state, after, drift + kick, alone)
        torch.testing.assert_close(after.raw, want, rtol=1e-9, atol=1e-9)
        state = after


def test_a_value_of_exactly_0_and_one_beyond_its_bounds_begin_within() -> None:
    """Closed form: ``from_zero``, and the bound."""
    hyper, state = made(Case(rules.Adam(), dict(lr=1e9, weight_decay=0.0)))
    values = hyper.values(state.raw)
    assert float(values["lr"]) == pytest.approx(LR.upper)
    assert float(values["weight_decay"]) == pytest.approx(1e-5)


def test_slopes_are_the_derivatives_of_values() -> None:
    """Truth: autograd."""
    hyper, state = made(CASES[0])
    raw = state.raw.clone().requires_grad_()
    values = hyper.values(raw)
    for at, name in enumerate(hyper.names):
        (want,) = torch.autograd.grad(values[name], raw, retain_graph=True)
        torch.testing.assert_close(hyper.slopes(values)[name].detach(), want[at])


def test_moves_stop_at_the_bounds() -> None:
    """Closed form: the bound; and nothing moves for a name that is not tuned."""
    known = Update(rules.AdamW()).hparams
    hyper = HyperOptimizer(choose(known, ("lr",), {"lr": (1e-4, 1e-2)}, 500), size=SIZE)
    state = hyper.begin({"lr": 1e-3})
    raw = hyper.move(state.raw, "lr", 100.0, hyper.frame())
    assert float(hyper.values(raw)["lr"]) == pytest.approx(1e-2)
    raw = hyper.move(state.raw, "lr", math.log(3), hyper.frame())
    assert float(hyper.values(raw)["lr"]) == pytest.approx(3e-3)
    assert hyper.move(raw, "momentum", 1.0, hyper.frame()) is raw


@pytest.mark.parametrize("climb", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_rate_that_may_not_climb_may_fall(slope: float, climb: float) -> None:
    """Twin: one that is free; penalties move alike in both."""
    case = Case(rules.SGD(), dict(lr=0.1, l1=1e-4))
    (hyper, state), (_, held) = made(case), made(case)
    start = state.raw
    for _ in range(5):
        state = hyper.step(state, vector(slope, slope), hyper.frame())
        held = hyper.step(
            held, vector(slope, slope), hyper.frame(), lr_increase_scale=vector(climb)
        )
    way, short = state.raw - start, held.raw - start
    assert abs(float(way[0])) > 0.1
    share = climb if slope < 0 else 1.0
    assert short.tolist() == pytest.approx([share * float(way[0]), float(way[1])])


def test_several_shifts_of_one_hyperparameter_step_each_for_itself() -> None:
    """Twins: one alone for each; rates and penalties of groups are apart."""
    known = Update(rules.SGD()).hparams
    names = ("lr", "momentum", "weight_decay")
    hyper = HyperOptimizer(
        choose(known, names, None, 500), size=SIZE, shifts=[2, 1, 2],
        settings=HyperSettings(apart=1.0),
    )  # fmt: skip
    origin = vector(-2.3, -3.0, 2.3, -9.2, -7.0)
    frame = Frame(origin, torch.full_like(origin, -20), torch.full_like(origin, 20))
    state = HyperState.begin(torch.zeros_like(origin))
    singles = [Ours({"h": free(pace=pace)}) for pace in (1.0, 1.0, 0.2, 1.0, 1.0)]
    for row in noise(20, 5) + 0.3:
        state = hyper.step(state, row, frame)
        want = torch.cat([single.step(row[i : i + 1]) for i, single in enumerate(singles)])
        torch.testing.assert_close(state.raw, want)
    raw = hyper.move(state.raw, "weight_decay", vector(0.5, -0.5), frame)
    torch.testing.assert_close(raw - state.raw, vector(0.0, 0.0, 0.0, 0.5, -0.5))


@pytest.mark.parametrize("apart", [0.0, 0.1, 1.0])
def test_shifts_of_one_hyperparameter_move_by_their_mean_and_a_share_apart(apart: float) -> None:
    """Closed form, of the first step: it is of the same size for each, by the gradient's sign."""
    tuned = choose(Update(rules.SGD()).hparams, ("lr",), None, 500)
    hyper = HyperOptimizer(tuned, size=SIZE, shifts=[3], settings=HyperSettings(apart=apart))
    frame = Frame(*(torch.full((3,), end, dtype=torch.float64) for end in (0.0, -20.0, 20.0)))
    state = hyper.step(HyperState.begin(torch.zeros_like(frame.low)), vector(1, 2, -3), frame)
    alone, mean = vector(-1, -1, 1) * SIZE, -SIZE / 3
    torch.testing.assert_close(state.raw, mean + apart * (alone - mean))


@pytest.mark.parametrize("case", CASES, ids=lambda c: type(c.rule).__name__)
def test_it_maps_over_a_population(case: Case) -> None:
    """Twins: each member alone, with a floor under weight decay and rates that may not climb."""
    hyper, start = made(case, WeightDecayFloor(shrinkage=SHRINKAGE, total_steps=TOTAL))
    states = [
        start._replace(raw=hyper.move(start.raw, "lr", change, hyper.frame()))
        for change in (0.0, 0.7, 1.4)
    ]
    stacked = HyperState(*(torch.stack(parts) for parts in zip(*states, strict=True)))
    memory, climb = vector(1.0, 5.0, 10.0).view(3, 1), vector(1.0, 0.5, 0.0).view(3, 1)

    def step(state: HyperState, signal: Tensor, memory: Tensor, climb: Tensor) -> HyperState:
        return hyper.step(state, signal, hyper.frame(), memory=memory, lr_increase_scale=climb)

    for signals in noise(15, len(case.values)).view(5, 3, -1):
        stacked = torch.func.vmap(step)(stacked, signals, memory, climb)
        states = [step(*each) for each in zip(states, signals, memory, climb, strict=True)]
    for member, state in enumerate(states):
        torch.testing.assert_close(stacked.raw[member], state.raw, rtol=1e-12, atol=0)
