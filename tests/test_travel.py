"""How far a run has come. Truths: random walks, straight lines, and a run with and without."""

import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st
from selftune.travel import LED_ON, LOST, Travel

WEIGHTS = 20_000


def walked(gradients: list[Tensor], momentum: str = "", mu: float = 0.0) -> float:
    """The ratio to a walk of steps, after steps along a running mean of gradients."""
    travel, weights, mean = Travel(), torch.zeros(WEIGHTS), torch.zeros(WEIGHTS)
    for gradient in gradients:
        mean = mu * mean + (1 - mu) * gradient
        values = {momentum: (mu, 0.99) if momentum == "betas" else mu} if momentum else {}
        step: Any = SimpleNamespace(params=weights, moved=weights - 0.1 * mean, values=values)
        travel.steps += travel.squares([step])
        weights = step.moved
    return travel.ratios(float(weights.norm()))[0]


def noise(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(WEIGHTS, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize(
    ("momentum", "mu"),
    [("", 0.0), ("momentum", 0.5), ("beta1", 0.9), ("momentum", 0.97), ("betas", 0.8)],
)
def test_a_random_walk_has_a_ratio_of_1(momentum: str, mu: float) -> None:
    """Law: in many dimensions its square is the sum of the gradients', whatever it remembers."""
    assert walked(noise(1500), momentum, mu) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("steps", [4, 100])
def test_a_straight_line_leads_further(steps: int) -> None:
    """Closed form: n steps of length 1 are n away, and √n times as far as a random walk."""
    assert walked([torch.ones(WEIGHTS)] * steps) == pytest.approx(math.sqrt(steps), rel=1e-4)


def test_going_to_and_fro_leads_nowhere() -> None:
    """Closed form: after an odd number n of steps, one step away: 1/√n."""
    there, back = torch.ones(WEIGHTS), -torch.ones(WEIGHTS)
    assert walked([there, back] * 12 + [there]) == pytest.approx(1 / 5)


def test_blocks_make_one_walk() -> None:
    """Law: the same weights in one block and in two."""
    moved, values = torch.arange(6.0), {"momentum": 0.5}
    steps: list[Any] = [
        SimpleNamespace(params=torch.zeros(len(part)), moved=part, values=values)
        for part in (moved[:3], moved[3:], moved)
    ]
    assert float(Travel.squares(steps[:2])) == pytest.approx(3 * 55)
    assert float(Travel.squares(steps[2:])) == pytest.approx(3 * 55)


def test_nothing_is_known_before_the_first_step() -> None:
    """Law: a rate is then as free as ever."""
    assert all(math.isnan(r) for r in Travel().ratios(0.0))
    assert Travel().led(0.0) == 1.0


@pytest.mark.parametrize(
    ("steps", "stretches", "led"),
    [(1.0, 1.0, 1.0), (0.8, 1.5, 1.0), (0.8, 1.3, 0.0), (0.95, 1.3, 0.5)],
)
def test_one_walk_that_leads_is_enough(steps: float, stretches: float, led: float) -> None:
    """Law: weights are led if they have come further than either walk would lead."""
    travel = Travel()
    travel.steps, travel.stretches = 1 / steps**2, 1 / stretches**2
    assert travel.led(1.0) == pytest.approx(led)


def test_its_state_goes_through_json() -> None:
    """Law: the same ratios after saving."""
    travel, again = Travel(7), Travel()
    travel.steps, travel.stretches = torch.tensor(4.0, dtype=torch.float64), 9.0
    again.load_state_dict(json.loads(json.dumps(travel.state_dict())))
    assert again.ratios(6.0) == travel.ratios(6.0) == (3.0, 2.0)
    assert again.since == 7


# in the optimizers

STEPS, EVERY = 100, 5


def run(turns: int | None) -> tuple[list[float], dict[str, list[float]], list[Tensor]]:
    """Rates, ratios and weights of a run whose validation loss asks for more of what was done.

    Args:
        turns: Steps from one turn of the gradient to the next; None: it never turns.
    """
    weight = nn.Parameter(torch.zeros(200))
    told: dict[str, list[float]] = {}

    def hear(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            told.setdefault(name, []).append(value)

    opt = st.SGD(
        [weight], lr=0.01, tune=("lr",), probe=False, guard=False, every=EVERY,
        total_steps=STEPS, schedule="constant", log_dir=hear,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rates, places = [], [weight.detach().clone()]
    for step in range(STEPS):
        turned = turns is not None and step // turns % 2
        gradient = 1 + 0.01 * torch.randn(200, generator=generator)
        weight.grad = -gradient if turned else gradient
        opt.step()
        places.append(weight.detach().clone())
        response = opt.state[weight]["response"][0].clone()
        opt.hyper_step(lambda along=response: -(weight @ along))
        rates.append(opt.hparams["lr"])
    opt.flush()
    return rates, told, places


def test_the_rate_climbs_where_weights_are_led() -> None:
    """Law: a validation loss falls along the response to the rate."""
    rates, told, _ = run(None)
    assert min(told["travel/steps"][1:]) > 1
    assert rates[-1] > 2 * rates[0]


def test_the_rate_does_not_climb_where_weights_go_to_and_fro() -> None:
    """Law: it rises at no hyper step but where a ratio allows it, or in the first tenth."""
    rates, told, _ = run(3)
    found = list(zip(told["travel/steps"], told["travel/stretches"], strict=True))
    freed = [s > LOST or w >= LED_ON for s, w in found]
    freed[0] = True
    after = rates[EVERY - 1 :: EVERY]
    rose = [b > a * (1 + 1e-9) for a, b in itertools.pairwise([0.01, *after])]
    assert freed.count(False) > 10
    assert any(rose)
    assert all(free for free, up in zip(freed, rose, strict=True) if up)


def test_stretches_are_those_of_the_weights() -> None:
    """Twin: distances between the weights at every twentieth step, written out."""
    _, told, places = run(9)
    at = [places[t] for t in range(0, STEPS + 1, 20)]
    squares = sum(float((b - a).double().square().sum()) for a, b in itertools.pairwise(at))
    away = float((places[-1] - places[0]).double().norm())
    assert told["travel/stretches"][-1] == pytest.approx(away / math.sqrt(squares), rel=1e-5)
