"""The step of the hyperparameters. Truths: torch's optimizers run beside it, and laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from selftune import rules
from selftune.bijections import Identity, Logit
from selftune.hparams import LR, Hparam, choose
from selftune.method import Frame, HyperOptimizer, HyperSettings, HyperState, WeightDecayFloor
from selftune.method.hyper_optimizer import trust
from selftune.optim._shifts import TorchProposal
from selftune.penalties import L1
from selftune.update import Update

SETTINGS = HyperSettings()
SIZE = 0.05
SHRINKAGE, TOTAL = 0.3, 500


def free(index: int = 0, **known: Any) -> Hparam:
    """A hyperparameter that is its own raw value, within no bounds that matter."""
    given = dict(name=f"h{index}", bijection=Identity(), lower=-1e9, upper=1e9, from_zero=1.0)
    return Hparam(**{**given, **known})


def frees(count: int, **known: Any) -> dict[str, Hparam]:
    return {h.name: h for h in (free(i, **known) for i in range(count))}


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def adam(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(raw, lr=SIZE, betas=SETTINGS.betas, eps=SETTINGS.eps)


def sgd(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(raw, lr=0.05)


def rmsprop(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(raw, lr=0.01, momentum=0.5)


class Ours:
    """The hyper optimizer, with its own Adam or one from outside, and its shifts from 0 on."""

    def __init__(self, hparams: dict[str, Hparam], make: Any = adam, **options: Any) -> None:
        self.hyper = HyperOptimizer(hparams, size=SIZE, **options)
        self.state = HyperState.begin(torch.zeros(len(hparams), dtype=torch.float64))
        self.frame = self.hyper.frame()
        self.propose = None if make is adam else TorchProposal(make, self.state.raw)

    def step(self, signal: Tensor, **options: Any) -> Tensor:
        self.state = self.hyper.step(
            self.state, signal, self.frame, propose=self.propose, **options
        )
        return self.state.raw


class Twin:
    """torch's optimizer alone."""

    def __init__(self, count: int, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.raw = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        self.optimizer = make([self.raw])

    def step(self, signal: Tensor) -> Tensor:
        self.raw.grad = signal.clone()
        self.optimizer.step()
        return self.raw.detach().clone()


MAKES = pytest.mark.parametrize("make", [adam, sgd, rmsprop], ids=lambda f: f.__name__)


def noise(steps: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, size, dtype=torch.float64, generator=generator)


@MAKES
def test_consistent_gradients_take_the_optimizers_own_steps(make: Any) -> None:
    """Truth: the torch optimizer alone, where all estimates agree and no bound is near."""
    twin = Twin(2, make)
    ours = Ours({"h0": free(0), "h1": free(1, pace=0.2)}, make)
    for _ in range(30):
        raw, alone = ours.step(vector(0.7, -0.3)), twin.step(vector(0.7, -0.3))
        torch.testing.assert_close(raw, vector(1.0, 0.2) * alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.state.mean.square(), ours.state.square)


@MAKES
def test_noise_moves_little(make: Any) -> None:
    """Laws: at most half of the optimizer's own walk, and a tenth of the way where all agree."""
    twin = Twin(256, make)
    noisy, steady = (Ours(frees(256), make) for _ in range(2))
    walked = walked_alone = 0.0
    for gradient in noise(200, 256).sign():
        before, alone = noisy.state.raw, twin.raw.detach().clone()
        walked_alone += float((twin.step(gradient) - alone).abs().sum())
        walked += float((noisy.step(gradient) - before).abs().sum())
        steady.step(torch.ones_like(gradient))
    assert walked < walked_alone / 2
    assert noisy.state.raw.square().mean().sqrt() < 0.1 * steady.state.raw.square().mean().sqrt()


@pytest.mark.parametrize("recent", [0.7, 0.8, 0.95])
def test_trust_is_a_quarter_where_hypergradients_are_noise(recent: float) -> None:
    """Closed form: the mean's variance is (1 − β)/(1 + β) of the square's mean; 1 if all agree."""
    settings = HyperSettings(recent=recent)
    mean, square = vector(math.sqrt((1 - recent) / (1 + recent)), 3.0, 0.0), vector(1.0, 9.0, 0.0)
    torch.testing.assert_close(trust(mean, square, settings), vector(0.25, 1.0, 0.0))


def test_no_step_is_longer_than_the_longest() -> None:
    """Law: the length of each step is bounded, and the bound is met."""
    ours = Ours(
        frees(2), lambda raw: torch.optim.SGD(raw, lr=100.0), settings=HyperSettings(longest=0.25)
    )
    assert ours.step(vector(1.0, -1.0)).tolist() == [-0.25, 0.25]


@MAKES
def test_bounds_hold_and_are_left_at_once(make: Any) -> None:
    """Law: at a bound, the first step the optimizer proposes inward leaves it.

    Truth for the proposals: the torch optimizer alone, whose steps do not depend on the shift.
    """
    twin, ours = Twin(1, make), Ours(frees(1, upper=0.2), make)
    inward = 0
    for step in range(60):
        before = twin.raw.detach().clone()
        gradient = vector(-1.0 if step < 40 else 0.9)
        inward += bool(twin.step(gradient) < before)
        ours.step(gradient)
        if step >= 39:
            assert (float(ours.state.raw) < 0.2) == (inward > 0)
    assert inward > 0
    if make is sgd:
        assert inward == 20  # without memory it is the first gradient that points inward


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hypergradients_that_are_not_finite_move_nothing(bad: float) -> None:
    """Law: the state is that of before, whichever of them it is."""
    ours = Ours(frees(2))
    ours.step(vector(1.0, 2.0))
    before = ours.state
    for signal in (vector(1.0, bad), vector(bad, 1.0)):
        ours.step(signal)
        assert all(torch.equal(a, b) for a, b in zip(before, ours.state, strict=True))


def test_forgetting_is_a_fresh_start_from_the_same_shifts() -> None:
    """Truth: a new hyper optimizer, offset by the shifts."""
    ours, fresh = Ours(frees(3)), Ours(frees(3))
    for gradient in noise(5, 3):
        ours.step(gradient)
    start = ours.state.raw
    ours.state = ours.state.forget()
    for gradient in noise(5, 3, seed=1):
        ours.step(gradient)
        fresh.step(gradient)
    torch.testing.assert_close(ours.state.raw - start, fresh.state.raw)


@pytest.mark.parametrize("divergences", [1, 3])
@pytest.mark.parametrize(
    ("below", "share"), [(4.0, 1.0), (3.0, 1.0), (3**0.75, 0.75), (1.0, 0.0), (0.5, 0.0)]
)
def test_the_rate_rises_slowly_near_the_peak_of_a_divergence(
    divergences: int, below: float, share: float
) -> None:
    """Closed form: log(peak / rate) / log 3 between 1/(1 + n) and 1; falls are as before."""
    for slope in (-1.0, 1.0):
        ours, free = Ours({"lr": LR}), Ours({"lr": LR})
        for _ in range(divergences):
            ours.state = ours.state.diverged()
        ours.state = ours.state.forget()._replace(raw=ours.state.raw - math.log(below))
        start = float(ours.state.raw)
        ours.step(vector(slope))
        free.step(vector(slope))
        factor = max(share, 1 / (1 + divergences)) if slope < 0 else 1.0
        assert float(ours.state.raw) - start == pytest.approx(factor * float(free.state.raw))


def test_without_caution_divergences_change_no_step() -> None:
    """Twin: one that never diverged."""
    ours, free = (Ours({"lr": LR}, settings=HyperSettings(caution=1.0)) for _ in range(2))
    ours.state = ours.state.diverged()
    for made in (ours, free):
        made.step(vector(-1.0))
    assert ours.state.raw.tolist() == free.state.raw.tolist()


def test_those_that_do_not_move_stay_and_the_others_step_as_alone() -> None:
    """Twin: one alone; what the other's gradient says is not looked at."""
    ours, alone = Ours(frees(2)), Ours(frees(1))
    for gradient in noise(20, 1):
        ours.step(torch.cat([gradient, vector(5.0)]), moving=["h0"])
        alone.step(gradient)
    assert ours.state.raw.tolist() == [float(alone.state.raw), 0.0]
    assert float(ours.state.mean[1]) == 0.0


# step sizes


@pytest.mark.parametrize(
    ("total", "every", "size"),
    [(None, 5, 0.05), (120, 5, 0.05 * (1000 / 120) ** 0.5), (360, 12, 0.12 * (1000 / 360) ** 0.5),
     (900, 20, 0.2 * (1000 / 900) ** 0.5), (10**6, 20, 0.2)],
)  # fmt: skip
def test_how_often_and_how_far(total: int | None, every: int, size: float) -> None:
    """The arithmetic by hand: a thirtieth of the run, 1 % a step, √(1000/T) more in short runs."""
    assert SETTINGS.every(total) == every
    assert SETTINGS.size(every, total) == pytest.approx(size)


def test_layer_hyperparameters_step_as_with_adam_however_noisy() -> None:
    """Truth: torch's Adam, at twice the size; the rate is held back where gradients disagree."""
    layer = Hparam(
        name="layer", bijection=Logit(), lower=1e-3, upper=0.99, from_zero=0.01,
        role="layer", pace=2.0,
    )  # fmt: skip
    hyper = HyperOptimizer({"lr": LR, "layer": layer}, size=SIZE)
    state = hyper.begin({"lr": 0.01, "layer": 0.5})
    twin, start = Twin(2, adam), state.raw
    paths = torch.zeros(2, dtype=torch.float64)
    for row in noise(60, 1):
        signal = (0.2 + row).expand(2)
        alone = twin.step(signal)
        before, state = state.raw, hyper.step(state, signal, hyper.frame())
        paths += (state.raw - before).abs()
        assert float(state.raw[1] - start[1]) == pytest.approx(2 * float(alone[1]), abs=1e-6)
    assert float(paths[0]) < 0.5 * float(paths[1]) / 2


# hyperparameters of rules


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
        held = hyper.step(held, vector(slope, slope), hyper.frame(), climb=vector(climb))
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
        return hyper.step(state, signal, hyper.frame(), memory=memory, climb=climb)

    for signals in noise(15, len(case.values)).view(5, 3, -1):
        stacked = torch.func.vmap(step)(stacked, signals, memory, climb)
        states = [step(*each) for each in zip(states, signals, memory, climb, strict=True)]
    for member, state in enumerate(states):
        torch.testing.assert_close(stacked.raw[member], state.raw, rtol=1e-12, atol=0)
