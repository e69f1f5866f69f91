"""The displacement ratio. Truths: random walks, straight lines, and a run with and without."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st
from selftune.method import Displacement, DisplacementLimit, MethodSettings

WEIGHTS = 20_000
LIMIT = DisplacementLimit()
Reduce = Callable[[Tensor], Tensor]


def alone(products: Tensor) -> Tensor:
    """One process."""
    return products


def walked(moves: list[Tensor]) -> float:
    """S² after segments of these moves."""
    place, step = torch.zeros(WEIGHTS), torch.tensor([0])
    found = Displacement.begin([place], step)
    for move in moves:
        place, step = place + move, step + LIMIT.segment
        found = found.update([place], step, LIMIT, alone)
    return float(found.square([place], alone))


def noise(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(WEIGHTS, generator=generator) for _ in range(count)]


def test_a_random_walk_has_a_ratio_of_1_and_takes_no_step_upwards() -> None:
    """Law: in many dimensions its square is the sum of the segments'."""
    assert walked(noise(100)) == pytest.approx(1.0, abs=0.05)
    assert LIMIT.climb(torch.ones(1)) == 0.0


@pytest.mark.parametrize("count", [4, 100])
def test_a_straight_line_leads_further(count: int) -> None:
    """Closed form: (Σ aⱼ)² / Σ aⱼ² over n segments, aⱼ = j (j + 1)."""
    weights = [j * (j + 1) for j in range(1, count + 1)]
    drift = sum(weights) ** 2 / sum(a * a for a in weights)
    assert walked([torch.ones(WEIGHTS)] * count) == pytest.approx(drift, rel=1e-4)


def test_an_oscillation_leads_nowhere() -> None:
    """Closed form: (Σ ±aⱼ)² / Σ aⱼ² over 25 segments, aⱼ = j (j + 1)."""
    there, back = torch.ones(WEIGHTS), -torch.ones(WEIGHTS)
    weights = [j * (j + 1) for j in range(1, 26)]
    fro = sum(a * (-1) ** j for j, a in enumerate(weights)) ** 2 / sum(a * a for a in weights)
    assert walked([there, back] * 12 + [there]) == pytest.approx(fro, rel=1e-4)


def test_what_was_long_ago_is_forgotten() -> None:
    """Law: ten times as many segments at random outweigh a line (from the start S² is 1.8)."""
    line = [torch.ones(WEIGHTS)] * 10
    assert walked(line) > LIMIT.drift
    assert walked(line + noise(100)) == pytest.approx(1.0, abs=0.05)


def test_nothing_is_known_before_the_first_segment_ends() -> None:
    """Law: a rate is then free to climb."""
    found = Displacement.begin([torch.zeros(3)], torch.tensor([0]))
    step = torch.tensor([LIMIT.segment - 1])
    found = found.update([torch.ones(3)], step, LIMIT, alone)
    assert found.square([torch.zeros(3)], alone).isnan()
    assert LIMIT.climb(found.square([torch.zeros(3)], alone)) == 1.0


@pytest.mark.parametrize("limit", [LIMIT, DisplacementLimit(random_walk=2.0, drift=6.0)])
def test_the_share_grows_from_random_walk_to_drift(limit: DisplacementLimit) -> None:
    """Closed form: a straight line between the two."""
    half = (limit.random_walk + limit.drift) / 2
    squares = torch.tensor([0.5, limit.random_walk, half, limit.drift, 9.0])
    assert limit.climb(squares).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def centre(began: Sequence[Tensor]) -> Tensor:
    """The mean of places, the j-th in proportion to j, written out."""
    total = sum(j * place for j, place in enumerate(began, start=1))
    return torch.as_tensor(total) / (len(began) * (len(began) + 1) / 2)


def square(here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(here, there, strict=True))


def test_segments_written_out() -> None:
    """Truth: distances of two parts, over a walk that drifts at first and oscillates then."""
    generator = torch.Generator().manual_seed(0)
    places = [torch.zeros(50).double(), torch.zeros(3, 4).double()]
    steps, since, shares = torch.tensor([3]), 3, set()
    found = Displacement.begin(places, steps)
    mark, began, moves = places, [], []
    for turn in range(40):
        pull = 1.0 if turn < 10 else (-1.0) ** turn
        kicks = [torch.randn(p.shape, generator=generator).double() for p in places]
        places = [p + pull * 0.3 + n for p, n in zip(places, kicks, strict=True)]
        steps = steps + 7
        if int(steps) - since >= LIMIT.segment:
            moves.append(square(places, mark))
            began.append(mark)
            mark, since = places, int(steps)
        found = found.update(places, steps, LIMIT, alone)
        assert (int(found.since), int(found.segments)) == (since, len(moves))
        if moves:
            means = [centre(past) for past in zip(*began, strict=True)]
            shares_of = [j * (j + 1) / (len(moves) * (len(moves) + 1)) for j in range(1, 41)]
            total = sum(a * a * m for a, m in zip(shares_of, moves, strict=False))
            now = found.square(places, alone)
            assert float(now) == pytest.approx(square(places, means) / total, rel=1e-9)
            shares.add(round(float(LIMIT.climb(now)), 2))
    assert {0.0, 1.0} < shares


def test_processes_that_hold_parts_of_the_weights_find_the_ratio_of_all() -> None:
    """Twin: one process with both parts; ``reduce`` adds the sums of the other process."""
    walks = [torch.randn(5, 6, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    sent: list[Tensor] = []

    def follow(walks: list[Tensor], reduce: Reduce) -> Tensor:
        found = Displacement.begin([walk[0] for walk in walks], torch.tensor([0]))
        for turn in range(1, 5):
            step, places = torch.tensor([turn * LIMIT.segment]), [walk[turn] for walk in walks]
            found = found.update(places, step, LIMIT, reduce)
        return found.square(places, reduce)

    follow(walks[:1], lambda products: sent.append(products) or products)
    whole = follow(walks, alone)
    torch.testing.assert_close(follow(walks[1:], lambda products: products + sent.pop(0)), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_it_does_not_depend_on_scale_or_dtype(scale: float, dtype: torch.dtype) -> None:
    """Closed form: that of a line, as above."""
    weights, step = torch.zeros(300, dtype=dtype), torch.tensor([0])
    found = Displacement.begin([weights], step)
    for turn in range(1, 5):
        weights, step = torch.full_like(weights, turn * scale), step + LIMIT.segment
        found = found.update([weights], step, LIMIT, alone)
    line = [j * (j + 1) for j in range(1, 5)]
    drift = sum(line) ** 2 / sum(a * a for a in line)
    assert float(found.square([weights], alone)) == pytest.approx(drift, rel=0.05)


def test_after_a_rewind_it_is_as_at_the_start() -> None:
    """Truth: a displacement that begins there."""
    weights, step = [torch.zeros(7)], torch.tensor([0])
    found = Displacement.begin(weights, step)
    for turn in range(1, 4):
        found = found.update([torch.full((7,), float(turn))], step + 20 * turn, LIMIT, alone)
    found = found.rewound([torch.ones(7)], 66)
    fresh = Displacement.begin([torch.ones(7)], torch.tensor([66]))
    torch.testing.assert_close(found, fresh, rtol=0, atol=0)


# in the optimizers

STEPS, EVERY = 100, 5


class Run:
    """A run whose validation loss asks for more of what was done.

    Args:
        turns: Steps from one turn of the gradient to the next; None: it never turns.
        options: Of the optimizer.
    """

    def __init__(self, turns: int | None, **options: Any) -> None:
        self.weight, self.turns, self.steps = nn.Parameter(torch.zeros(200)), turns, 0
        self.told: dict[str, list[float]] = {}
        self.rates: list[float] = []
        self.places = [self.weight.detach().clone()]
        self.generator = torch.Generator().manual_seed(0)
        self.opt = st.SGD(
            [self.weight], lr=0.01, tune=("lr",), probe=False, every=EVERY,
            total_steps=STEPS + EVERY, schedule="constant", log_dir=self._hear, **options,
        )  # fmt: skip  # at the very end there would be no hyperparameter step

    def _hear(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.told.setdefault(name, []).append(value)

    def go(self, steps: int = STEPS) -> Run:
        for _ in range(steps):
            turned = self.turns is not None and self.steps // self.turns % 2
            gradient = 1 + 0.01 * torch.randn(200, generator=self.generator)
            self.weight.grad = -gradient if turned else gradient
            self.opt.step()
            self.steps += 1
            self.places.append(self.weight.detach().clone())
            along = self.opt.state[self.weight]["sensitivity/0"].clone()
            self.opt.hyper_step(lambda along=along: -(self.weight @ along))
            self.rates.append(self.opt.hparams["lr"])
        self.opt.flush()
        return self

    @property
    def ratios(self) -> list[float]:
        """One for each hyperparameter step: NaN before the first segment ends, which has none."""
        told = self.told["weights/displacement"]
        return [math.nan] * (self.steps // EVERY - len(told)) + told


def test_the_rate_climbs_where_weights_drift() -> None:
    """Law: a validation loss falls along the sensitivity to the rate."""
    run = Run(None).go()
    assert run.ratios[-1] ** 2 > LIMIT.drift
    assert run.rates[-1] > 2 * run.rates[0]


def test_the_rate_does_not_climb_where_weights_oscillate() -> None:
    """Law: it rises at no hyperparameter step but where the ratio allows it."""
    run = Run(3).go()
    freed = [math.isnan(s) or s * s > LIMIT.random_walk for s in run.ratios]
    after = run.rates[EVERY - 1 :: EVERY]
    rose = [b > a * (1 + 1e-9) for a, b in itertools.pairwise([0.01, *after])]
    assert freed.count(False) > 10
    assert any(rose)
    assert all(free for free, up in zip(freed, rose, strict=True) if up)


@pytest.mark.parametrize(
    "options", [dict(guard=False), dict(settings=replace(MethodSettings(), displacement=None))]
)
def test_without_a_guard_or_a_limit_it_climbs_anywhere(options: dict[str, Any]) -> None:
    """Twin: the same run, which is held back."""
    free = Run(3, **options).go()
    assert "weights/displacement" not in free.told
    assert free.rates[-1] > 1.1 * Run(3).go().rates[-1]


def test_segments_are_those_of_the_weights() -> None:
    """Twin: distances between the weights at every twentieth step, written out."""
    run = Run(9).go()
    at = [run.places[t] for t in range(0, STEPS + 1, 20)]
    weights = [(j * (j + 1) / 30) ** 2 for j in range(1, 6)]
    moves = [float((b - a).double().square().sum()) for a, b in itertools.pairwise(at)]
    squares = sum(w * m for w, m in zip(weights, moves, strict=True))
    away = float((run.places[-1] - centre(at[:-1])).double().norm())
    assert run.ratios[-1] == pytest.approx(away / math.sqrt(squares), rel=1e-5)


def test_a_saved_run_knows_how_far_it_has_come() -> None:
    """Truth: the run that was not interrupted, within a segment."""
    run, again = Run(9).go(53), Run(9)
    again.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    with torch.no_grad():
        again.weight.copy_(run.weight)
    again.generator.set_state(run.generator.get_state())
    again.steps = 53
    before = len(run.ratios)
    assert again.go(40).ratios[before:] == run.go(40).ratios[before:]
    assert again.rates == run.rates[53:]
