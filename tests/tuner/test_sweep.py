"""The sweep of a tuner. Truth: descent on ½ w², which diverges above 2."""

import pytest
import torch
from parts import made as built
from torch import Tensor, nn

import selftune as st
from selftune.control import Controller, Guard, LRSweep
from selftune.tuner._run_state import RunState
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps
from selftune.tuner._sweep import sweep

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


def test_a_sweep_ends_at_its_lowest_point_and_every_batch_of_it_is_a_step() -> None:
    """Law: the weights are those of the rate it chose, and its last batch took no step."""
    steps, run = made(1e-2)
    known = LRSweep(steps=20)
    controller = Controller(hparams=steps.hyper.hparams, sweep=known, guard=Guard())
    snapshots = Snapshots(run, steps.method, False)
    weights: list[Tensor] = []  # before each batch

    def batch() -> tuple[Tensor, Tensor]:
        weights.append(run.weights[0].clone())
        return BATCH

    taken = sweep(steps, snapshots, controller, batch)
    assert taken == int(run.step) == int(run.since) == len(weights)
    assert int(run.age) == 0
    assert known.taken == taken - 1
    factors = [known.factor(step) / known.settings.margin for step in range(known.taken)]
    after = weights[1 + factors.index(known.choice)]
    assert torch.equal(run.weights[0], after)
    assert float(after.abs().max()) == min(float(w.abs().max()) for w in weights)
    rate = float(steps.hyper.values(run.hyper.raw)["lr"])
    assert rate == pytest.approx(1e-2 * known.choice)
