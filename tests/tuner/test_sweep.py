"""The sweep of a tuner. Truth: descent on ½ w², which diverges above 2."""

from typing import Any

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


def loader(scale: float) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= scale
    return [(x[i : i + 8], x[i : i + 8, :1]) for i in range(0, 40, 8)]


def drop_in(model: nn.Module, data: list[tuple[Tensor, Tensor]], steps: int) -> None:
    opt = st.AdamW(model, lr=0.01, total_steps=steps)
    for step in range(steps):
        x, y = data[step % len(data)]
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        opt.hyper_step(lambda: nn.functional.mse_loss(model(data[0][0]), data[0][1]))


def tuned(model: nn.Module, data: list[tuple[Tensor, Tensor]], steps: int) -> None:
    st.Tuner(model, nn.MSELoss(), hparams={"lr": 0.01}).fit(data, data, steps=steps, progress=False)


class Length(nn.Module):
    """A finite loss whose gradient is not: √0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) * 0).square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("train", [drop_in, tuned])
def test_a_sweep_without_a_finite_gradient_ends(
    train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: the run ends; its weights are the given ones."""
    torch.manual_seed(0)
    model = Length()
    before = [p.clone() for p in model.parameters()]
    train(model, loader(1.0), 60)
    assert "training gradients in a row are not finite: the learning-rate sweep ends" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("train", [drop_in, tuned])
def test_gradients_whose_squares_overflow_are_finite(
    train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: one column of numbers of 10¹² does not keep the other weights where they are.

    The tuner returns the best weights, here those of the start.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    before = model.weight.detach().clone()
    train(model, loader(1e12), 60)
    assert "not finite; the step is skipped" not in caplog.text
    assert train is tuned or bool((model.weight[:, :3] != before[:, :3]).all())
