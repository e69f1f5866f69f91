"""How far a run has come. Truths: random walks, straight lines, and a run with and without."""

import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn

import selftune as st
from selftune.travel import LED, LOST, STRETCH, Travel, Way

WEIGHTS = 20_000


def walked(stretches: list[Tensor]) -> float:
    """The squared ratio after stretches, from the mean of where each of them began."""
    travel, place, began = Travel(), torch.zeros(WEIGHTS), []
    for at, stretch in enumerate(stretches, start=1):
        began.append(place)
        place = place + stretch
        travel.add(float(stretch.square().sum()), at * STRETCH)
    return travel.ratio(float((place - centre(began)).norm())) ** 2


def centre(began: list[Tensor]) -> Tensor:
    """The mean of places, the j-th in proportion to j, written out."""
    total = sum(j * place for j, place in enumerate(began, start=1))
    return torch.as_tensor(total) / (len(began) * (len(began) + 1) / 2)


def test_a_random_walk_has_a_ratio_of_1_and_is_lost() -> None:
    """Law: in many dimensions its square is the sum of the stretches'."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(WEIGHTS, generator=generator) for _ in range(100)]
    assert walked(noise) == pytest.approx(1.0, abs=0.05)
    assert Travel(squares=1.0).led(1.0) == 0.0


@pytest.mark.parametrize("count", [4, 100])
def test_a_straight_line_leads_further(count: int) -> None:
    """Closed form: (Σ aⱼ)² / Σ aⱼ² over n stretches, aⱼ = j (j + 1)."""
    weights = [j * (j + 1) for j in range(1, count + 1)]
    led = sum(weights) ** 2 / sum(a * a for a in weights)
    assert walked([torch.ones(WEIGHTS)] * count) == pytest.approx(led, rel=1e-4)


def test_going_to_and_fro_leads_nowhere() -> None:
    """Closed form: (Σ ±aⱼ)² / Σ aⱼ² over 25 stretches, aⱼ = j (j + 1)."""
    there, back = torch.ones(WEIGHTS), -torch.ones(WEIGHTS)
    weights = [j * (j + 1) for j in range(1, 26)]
    fro = sum(a * (-1) ** j for j, a in enumerate(weights)) ** 2 / sum(a * a for a in weights)
    assert walked([there, back] * 12 + [there]) == pytest.approx(fro, rel=1e-4)


def test_what_was_long_ago_is_forgotten() -> None:
    """Law: ten times as many stretches at random outweigh a line (from the start S² is 1.8)."""
    generator = torch.Generator().manual_seed(0)
    line = [torch.ones(WEIGHTS)] * 10
    noise = [torch.randn(WEIGHTS, generator=generator) for _ in range(100)]
    assert walked(line) > LED
    assert walked(line + noise) == pytest.approx(1.0, abs=0.05)


def test_nothing_is_known_before_the_first_stretch_ends() -> None:
    """Law: a rate is then as free as ever."""
    assert math.isnan(Travel().ratio(0.0))
    assert Travel().led(0.0) == 1.0


@pytest.mark.parametrize(
    ("square", "led"), [(0.5, 0.0), (LOST, 0.0), ((LOST + LED) / 2, 0.5), (LED, 1.0), (9.0, 1.0)]
)
def test_it_grows_from_lost_to_led(square: float, led: float) -> None:
    """Closed form."""
    assert Travel(squares=1.0).led(square**0.5) == pytest.approx(led)


def test_its_state_goes_through_json() -> None:
    """Law: the same after saving."""
    travel, again = Travel(squares=9.0, since=7, stretches=3), Travel()
    again.load_state_dict(json.loads(json.dumps(travel.state_dict())))
    assert again == travel


def test_on_the_device_it_is_the_same() -> None:
    """Twin: Travel, over a walk that is led at first and then goes to and fro."""
    generator = torch.Generator().manual_seed(0)
    places = [torch.zeros(50), torch.zeros(3, 4)]
    travel, steps = Travel(since=3), torch.tensor([3])
    way = Way.begun(places, steps)
    mark, began, seen = places, [], set()
    for turn in range(40):
        pull = 1.0 if turn < 10 else (-1.0) ** turn
        noise = [torch.randn(p.shape, generator=generator) for p in places]
        places = [p + pull * 0.3 + n for p, n in zip(places, noise, strict=True)]
        steps = steps + 7
        if travel.ended(int(steps)):
            travel.add(square(places, mark), int(steps))
            began.append(mark)
            mark = places
        way, led = way.onward(places, steps)
        means = [centre(list(past)) for past in zip(*began, strict=True)] or mark
        away = math.sqrt(square(places, means))
        assert float(led) == pytest.approx(travel.led(away), abs=1e-5)
        assert int(way.since) == travel.since
        if travel.squares:
            assert float(way.square(places)) == pytest.approx(travel.ratio(away) ** 2, rel=1e-5)
        seen.add(round(travel.led(away), 2))
    assert {0.0, 1.0} < seen


def square(here: list[Tensor], there: list[Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(here, there, strict=True))


# in the optimizers

STEPS, EVERY = 100, 5


def run(
    turns: int | None, guard: bool = True
) -> tuple[list[float], dict[str, list[float]], list[Tensor]]:
    """Rates, ratios and weights of a run whose validation loss asks for more of what was done.

    Args:
        turns: Steps from one turn of the gradient to the next; None: it never turns.
        guard: Of the optimizer.
    """
    weight = nn.Parameter(torch.zeros(200))
    told: dict[str, list[float]] = {}

    def hear(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            told.setdefault(name, []).append(value)

    opt = st.SGD(
        [weight], lr=0.01, tune=("lr",), probe=False, guard=guard, every=EVERY,
        total_steps=STEPS + EVERY, schedule="constant", log_dir=hear,
    )  # fmt: skip  # at the very end there would be no hyper step
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
    assert told["travel/ratio"][-1] ** 2 > LED
    assert rates[-1] > 2 * rates[0]


def test_the_rate_does_not_climb_where_weights_go_to_and_fro() -> None:
    """Law: it rises at no hyper step but where the ratio allows it."""
    rates, told, _ = run(3)
    freed = [math.isnan(s) or s * s > LOST for s in told["travel/ratio"]]
    after = rates[EVERY - 1 :: EVERY]
    rose = [b > a * (1 + 1e-9) for a, b in itertools.pairwise([0.01, *after])]
    assert freed.count(False) > 10
    assert any(rose)
    assert all(free for free, up in zip(freed, rose, strict=True) if up)


def test_without_a_guard_it_climbs_anywhere() -> None:
    """Twin: the same run with a guard, which is held back."""
    free, told, _ = run(3, guard=False)
    assert "travel/ratio" not in told
    assert free[-1] > 1.1 * run(3)[0][-1]


def test_stretches_are_those_of_the_weights() -> None:
    """Twin: distances between the weights at every twentieth step, written out."""
    _, told, places = run(9)
    at = [places[t] for t in range(0, STEPS + 1, 20)]
    weights = [(j * (j + 1) / 30) ** 2 for j in range(1, 6)]
    stretches = [float((b - a).double().square().sum()) for a, b in itertools.pairwise(at)]
    squares = sum(w * s for w, s in zip(weights, stretches, strict=True))
    away = float((places[-1] - centre(at[:-1])).double().norm())
    assert told["travel/ratio"][-1] == pytest.approx(away / math.sqrt(squares), rel=1e-5)
