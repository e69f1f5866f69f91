"""The vector of tuned hyperparameters: the same steps as Tuning, its twin on the host."""

import math

import pytest
import torch

from selftune import rules
from selftune.bijections import Logit
from selftune.floor import Floor
from selftune.hparams import LR, Hparam
from selftune.hyperstep import BETAS, EPS
from selftune.hypervector import HyperVector
from selftune.penalties import L1
from selftune.schedules import Schedule
from selftune.tuning import Tuning
from selftune.update import Update

HORIZON = 500


def twins(rule: rules.AbstractRule, values: dict[str, float]) -> tuple[Tuning, HyperVector]:
    update = Update(rule, (L1(1e-4),))
    tune = tuple(values)
    floor = Floor.of(rule, Schedule(total_steps=HORIZON))
    tuning = Tuning(update.hparams, tune=tune, horizon=HORIZON, floor=floor)
    tuning.lay_out({n: [v] for n, v in values.items()}, [0])
    return tuning, HyperVector(update.hparams, tune, horizon=HORIZON, floor=floor)


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (rules.SGD(), dict(lr=0.01, decay=1e-4, momentum=0.9, weight_decay=1e-4, l1=1e-5)),
        (rules.AdamW(), dict(lr=1e-3, decay=1e-5, beta1=0.9, weight_decay=1e-2)),
        (rules.AdamW(), dict(lr=1e-2, weight_decay=1.0)),
        (rules.Lion(), dict(lr=1e-8, weight_decay=1.0)),
        (rules.Adam(), dict(lr=1e-3, weight_decay=0.0)),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_steps_equal_those_of_tuning(
    rule: rules.AbstractRule, values: dict[str, float], seed: int
) -> None:
    """Twin, whether decay lies on its floor or climbs."""
    tuning, vector = twins(rule, values)
    state = vector.init(values)
    drift = torch.randn(len(values), generator=torch.Generator().manual_seed(seed)).double()
    for step in range(60):
        noise = torch.randn(len(values), generator=torch.Generator().manual_seed(step + 1))
        signal = drift + noise.double()
        momentum = float(vector.values(state.raw).get("momentum", 0.0))
        tuning.memory = 1 / (1 - momentum)
        tuning.step(signal.view(-1, 1), tuning.names)
        state = vector.step(state, signal, 1 / (1 - momentum))
        for name, value in vector.values(state.raw).items():
            assert float(value) == pytest.approx(float(tuning.rows[name].values()), rel=1e-9)


def test_strengths_step_as_with_adam_however_noisy() -> None:
    """Of twice the size, up to the longest step; the rate, which is none, is held back."""
    known = {"lr": LR, "rate": Hparam(name="rate", bijection=Logit(), lower=1e-3, upper=0.99,
                                      from_zero=0.01)}  # fmt: skip
    vector = HyperVector(known, ("lr", "rate"), horizon=HORIZON, rate=0.05, strengths=("rate",))
    state = vector.init({"lr": 0.01, "rate": 0.5})
    twin = torch.zeros(2, dtype=torch.float64)
    adam = torch.optim.Adam([twin], lr=0.1, betas=BETAS, eps=EPS)
    start, generator = state.raw.clone(), torch.Generator().manual_seed(0)
    paths = torch.zeros(2, dtype=torch.float64)
    for _ in range(60):
        signal = 0.2 + torch.randn(1, generator=generator).double().expand(2)
        twin.grad = signal
        adam.step()
        before, state = state.raw, vector.step(state, signal, 1.0)
        paths += (state.raw - before).abs()
        assert float(state.raw[1] - start[1]) == pytest.approx(float(twin[1]), abs=1e-6)
    assert float(paths[0]) < 0.5 * float(paths[1]) / 2


def test_a_signal_that_is_not_finite_moves_nothing() -> None:
    _, vector = twins(rules.AdamW(), dict(lr=1e-3, weight_decay=1e-2))
    state = vector.init(dict(lr=1e-3, weight_decay=1e-2))
    after = vector.step(state, torch.tensor([math.nan, 1.0]), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_moves_stop_at_the_bounds() -> None:
    vector = HyperVector(
        Update(rules.AdamW()).hparams, ("lr",), {"lr": (1e-4, 1e-2)}, horizon=HORIZON
    )
    state = vector.move(vector.init(dict(lr=1e-3)), "lr", 100.0)
    assert float(vector.values(state.raw)["lr"]) == pytest.approx(1e-2)
    assert vector.move(state, "momentum", 1.0) is state


def test_it_maps_over_a_population() -> None:
    _, vector = twins(rules.SGD(), dict(lr=0.01, momentum=0.9, weight_decay=1e-4))
    states = [
        vector.init(dict(lr=lr, momentum=0.9, weight_decay=1e-4)) for lr in (0.01, 0.02, 0.04)
    ]
    signals = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    stacked = type(states[0])(*(torch.stack(parts) for parts in zip(*states, strict=True)))
    mapped = torch.func.vmap(lambda s, g: vector.step(s, g, 10.0))(stacked, signals)
    for member, state in enumerate(states):
        alone = vector.step(state, signals[member], 10.0)
        torch.testing.assert_close(mapped.raw[member], alone.raw, rtol=1e-12, atol=0)
