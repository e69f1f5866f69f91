"""Rates far too low for anything to be learned. Truth: the best fixed rate, 0.3 for this network.

In float32 the first steps of their sweeps round most weights to the values they had.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

# With 10, slopes that rounding made ended the sweep at 1e-8.
SEEDS = 10, pytest.param(11, marks=pytest.mark.slow)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [2e-6, 1e-8])
def test_the_sweep_reaches_a_useful_rate_in_a_loop(rate: float, seed: int) -> None:
    x, y = digits()
    net, generator = network(seed), torch.Generator().manual_seed(seed)
    opt = st.SGD(net, lr=rate, momentum=0.9, total_steps=2000)
    for _ in range(500):
        index = torch.randint(len(x), (64,), generator=generator)
        opt.zero_grad()
        cross_entropy(net(x[index]), y[index]).backward()
        opt.step()
        opt.hyper_step(lambda: cross_entropy(net(x), y))
    assert 0.03 < opt.hparams["lr"] < 3
    with opt.averaged(), torch.no_grad():
        assert float(cross_entropy(net(x), y)) < 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_sweep_reaches_a_useful_rate_in_a_tuner(seed: int) -> None:
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.randint(len(x), (64,), generator=generator) for _ in range(2000))
    tuner = st.Tuner(
        network(seed), cross_entropy, rule=st.rules.SGD(), hparams={"lr": 2e-6, "momentum": 0.9},
        compile=False,
    )  # fmt: skip

    def end(progress: st.tuner.Progress) -> None:
        raise KeyboardInterrupt  # a quarter of the run is enough

    result = tuner.fit(
        ((x[i], y[i]) for i in indices), [(x, y)], steps=2000, evaluate_every=500, callbacks=[end],
        progress=False,
    )  # fmt: skip
    assert result.steps == 500
    assert result.best_loss < 0.5
