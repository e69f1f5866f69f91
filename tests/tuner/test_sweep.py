"""A sweep and the trial of its choice. Truths: descent on ½ w², which diverges above 2, a twin."""

import pytest
import torch
from parts import assert_same, write
from parts import made as built
from torch import Tensor, nn

import selftune as st
from selftune.control import Controller, Guard, LRSweep
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import RunState, Steps
from selftune.tuner._sweep import Sweep

BATCH = torch.zeros(1), torch.zeros(1)


class Bowl(nn.Module):
    """Its output is its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def made(rate: float) -> tuple[Steps, RunState]:
    """A loss of ½ w², every fifth step of which is tracked."""
    return built(
        Bowl(), st.rules.SGD(), values={"lr": rate},
        loss=lambda output, target: output.square().sum() / 2, estimator=st.Trace(stride=5),
    )  # fmt: skip


def sweeping(
    steps: Steps, run: RunState, sweep: LRSweep, guard: Guard | None = None
) -> tuple[Sweep, Controller]:
    controller = Controller(hparams=steps.hyper.hparams, sweep=sweep, guard=guard)
    return Sweep(steps, run, Snapshots(run, steps.method, False), controller), controller


def tried(rate: float, lowest: float) -> tuple[float, Tensor, RunState]:
    """Rate, weights and run after a trial that begins where a descent of ``-lowest`` led."""
    steps, run = made(rate)
    known = LRSweep(steps=10, ended=True, lowest=lowest)
    sweep, controller = sweeping(steps, run, known, Guard())
    with torch.no_grad():
        while controller.on_trial:
            sweep.trial(BATCH, tracked=steps.observed(int(run.age) + 1)[0])
    return float(steps.hyper.values(run.hyper.raw)["lr"]), run.weights[0], run


def test_a_rate_that_leads_uphill_is_lowered_from_where_it_began() -> None:
    """Closed form: the first step at 2.5 adds 1.25 to ½·2, of which it may lose 1."""
    rate, weights, run = tried(2.5, lowest=-2.0)
    assert rate == pytest.approx(2.5 / 3)
    assert int(run.since) == 2  # the step, and the batch that showed where it led
    assert int(run.age) == 11  # ten steps are judged, the last of them by the gradient after it
    assert int(run.step) == 13
    assert weights.tolist() == pytest.approx([(1 - 2.5 / 3) ** 11] * 2)


@pytest.mark.parametrize("rate", [0.3, 1.9])
def test_a_rate_that_descends_is_kept(rate: float) -> None:
    """Closed form: weights shrink by 1 − η a step, also where they oscillate."""
    kept, weights, run = tried(rate, lowest=-2.0)
    assert kept == pytest.approx(rate)
    assert int(run.step) == int(run.age) == 11
    assert weights.tolist() == pytest.approx([(1 - rate) ** 11] * 2)


def test_its_steps_are_training_steps() -> None:
    """Twin: as many steps of the run itself, of which every fifth is tracked."""
    run = tried(0.3, lowest=-2.0)[2]
    steps, twin = made(0.3)
    with torch.no_grad():
        for step in range(1, 12):
            write(twin, steps.train(twin, BATCH, tracked=step % 5 == 0)[0])
    assert_same(run, twin)


def test_without_a_guard_nothing_is_tried() -> None:
    """Law: nobody may take the run back then."""
    known = LRSweep(steps=10, ended=True, lowest=-2.0)
    assert not sweeping(*made(2.5), known)[1].on_trial


def test_a_sweep_ends_at_its_lowest_point_and_every_batch_of_it_is_a_step() -> None:
    """Law: the weights are those of the rate it chose, and its last batch took no step."""
    steps, run = made(1e-2)
    sweep, controller = sweeping(steps, run, LRSweep(steps=20), Guard())
    weights: list[Tensor] = []  # before each batch

    def batch() -> tuple[Tensor, Tensor]:
        weights.append(run.weights[0].clone())
        return BATCH

    taken = sweep.sweep(batch)
    known = controller.sweep
    assert known is not None
    assert taken == int(run.step) == int(run.since) == len(weights)
    assert int(run.age) == 0
    assert known.taken == taken - 1
    factors = [known.factor(step) / known.settings.margin for step in range(known.taken)]
    after = weights[1 + factors.index(known.choice)]
    assert torch.equal(run.weights[0], after)
    assert float(after.abs().max()) == min(float(w.abs().max()) for w in weights)
    rate = float(steps.hyper.values(run.hyper.raw)["lr"])
    assert rate == pytest.approx(1e-2 * known.choice)
