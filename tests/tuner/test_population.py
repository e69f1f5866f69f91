"""Populations. Truths: a run of its own for each member, and the exchange done by hand."""

import copy
import math

import pytest
import torch
from jobs import loader, points, same, tuner
from torch import nn
from torch.utils._pytree import tree_leaves

import selftune as st
from selftune.control import Controller, Guard
from selftune.tuner import _training  # private, as the next: members do not show outside
from selftune.tuner._population import KICK, Population

VAL = [points(100, seed=1)]


class Spied:
    """Runs a tuner and keeps the parts of its run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training: _training.Training
        go = _training.Training.go

        def spy(training: _training.Training) -> str:
            self.training = training
            return go(training)

        monkeypatch.setattr(_training.Training, "go", spy)


def judges(*losses: float) -> list[Controller]:
    """Of members with these recent validation losses."""
    return [Controller(hparams={}, guard=Guard(mean=loss)) for loss in losses]


def test_one_member_is_no_population(monkeypatch: pytest.MonkeyPatch) -> None:
    spied = Spied(monkeypatch)
    one = tuner(population=1).fit(loader(), VAL, steps=40, progress=False)
    assert spied.training.population is None
    assert same(one.history, tuner().fit(loader(), VAL, steps=40, progress=False).history)


@pytest.mark.parametrize("members", [3, 4, 5])
def test_members_start_apart_and_the_first_as_given(
    members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spied = Spied(monkeypatch)
    tuner(population=members, probe=False).fit(loader(), VAL, steps=1, progress=False)
    training = spied.training
    rates = training.steps.hyper.values(training.fused.run.hyper.raw.T)["lr"]
    assert float(rates[0]) == pytest.approx(0.01)
    assert len({round(math.log(rate), 3) for rate in rates.tolist()}) == members
    assert float(rates.min()) == pytest.approx(0.001, rel=0.01)
    assert float(rates.max()) == pytest.approx(0.1, rel=0.01)


def test_the_worst_go_on_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    spied = Spied(monkeypatch)
    tuner(population=4, probe=False).fit(loader(), VAL, steps=20, progress=False)
    training = spied.training
    controllers = training.watch.controllers = judges(0.5, 0.2, math.inf, 0.4)
    before = [leaf.clone() for leaf in tree_leaves(training.fused.run)]
    Population(4).exploit(training.snapshots, training.watch, training.steps.hyper)
    for new, old in zip(tree_leaves(training.fused.run), before, strict=True):
        kept = [0, 1, 3]
        assert torch.equal(new[kept], old[kept])
        if new is not training.fused.run.hyper.raw:
            assert torch.equal(new[2], old[1])
    place = training.steps.hyper.names.index("lr")
    moved = float(training.fused.run.hyper.raw[2, place] - training.fused.run.hyper.raw[1, place])
    assert abs(moved) == pytest.approx(KICK)
    assert controllers[2].guard.mean == 0.2
    assert controllers[2].guard is not controllers[1].guard


def test_equals_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    spied = Spied(monkeypatch)
    tuner(population=2, probe=False).fit(loader(), VAL, steps=5, progress=False)
    before = copy.deepcopy(spied.training.fused.run.hyper.raw)
    training = spied.training
    training.watch.controllers = judges(0.3, 0.3)
    Population(2).exploit(training.snapshots, training.watch, training.steps.hyper)
    assert torch.equal(spied.training.fused.run.hyper.raw, before)


@pytest.mark.slow
def test_a_population_learns_and_survives_a_member_that_blows_up() -> None:
    wild = tuner(population=4, hparams={"lr": 30.0, "momentum": 0.9}, exploit_every=10)
    result = wild.fit(loader(shuffle=True), VAL, epochs=12, progress=False)
    assert result.best_loss < 0.5
    assert math.isfinite(result.history["train_loss"][-1])


def test_the_history_is_that_of_the_leader() -> None:
    """Truths: a single run's schedule, and a log without the others' NaN."""

    def fit(members: int) -> st.TuningResult:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1))
        x = torch.randn(400, 8)
        batches = list(zip(x.split(40), x.sum(1, keepdim=True).split(40), strict=True))
        wild = st.Tuner(
            net, torch.nn.functional.mse_loss, rule=st.rules.SGD(), hparams={"lr": 3.0},
            compile=False, probe=False, population=members, exploit_every=1000,
        )  # fmt: skip
        return wild.fit(batches[:8], batches[8:], epochs=25, progress=False)

    for members in (1, 2, 4):
        result = fit(members)
        assert len(result.history["rewinds"]) > 0
        assert result.schedule.steps < result.steps  # without undone steps
        assert max(result.schedule.values["lr"])[1] < 1.0, members
    assert math.isfinite(result.history["train_loss"][-1])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's
def test_transformers_with_masks() -> None:
    """The fused kernel for evaluation mode has no rule for several models at once."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=x[..., 0] > 1).mean((1, 2)).unsqueeze(1)

    x = torch.randn(32, 5, 8, generator=torch.Generator().manual_seed(0)).clamp(max=2)
    x[:, 0, 0] = 0
    batches = [(part, part.sum((1, 2)).unsqueeze(1)) for part in x.split(8)]
    tuner = st.Tuner(Reader(), nn.functional.mse_loss, population=2, compile=False)
    result = tuner.fit(batches[:3], batches[3:], epochs=8, progress=False)
    assert math.isfinite(result.best_loss)
    assert torch.backends.mha.get_fastpath_enabled()
