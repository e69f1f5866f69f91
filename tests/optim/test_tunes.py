"""What the whole does on small problems. Truths: known best values, and plain torch's result."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

STEPS = 300


def task(seed: int = 0):
    """Noisy two-class data in 20 dimensions, of which 2 matter: train, validation and test."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1200, 20, generator=generator)
    y = (x[:, 0] + x[:, 1] + 0.5 * torch.randn(1200, generator=generator) > 0).long()
    return [(x[a:b], y[a:b]) for a, b in ((0, 200), (200, 600), (600, 1200))]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))


def run(make, steps: int = STEPS, hyper: bool = True) -> tuple[float, st.optim.SelfTuningOptimizer]:
    """Train on batches of 20; the test loss at the averaged weights."""
    train, val, test = task()
    net = network()
    opt = make(net)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        index = torch.randint(200, (20,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(net(train[0][index]), train[1][index]).backward()
        opt.step()
        at = torch.randint(400, (50,), generator=generator)
        if hyper:
            opt.hyper_step(lambda at=at: F.cross_entropy(net(val[0][at]), val[1][at]))
    with opt.averaged(), torch.no_grad():
        assert all(p.isfinite().all() for p in net.parameters())
        return float(F.cross_entropy(net(test[0]), test[1])), opt


def plain(name: str, lr: float) -> float:
    """The same steps with torch's own optimizer; the test loss."""
    train, _, test = task()
    net = network()
    opt = getattr(torch.optim, name)(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        index = torch.randint(200, (20,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(net(train[0][index]), train[1][index]).backward()
        opt.step()
    with torch.no_grad():
        return float(F.cross_entropy(net(test[0]), test[1]))


@pytest.mark.parametrize("lr", [1e-6, 1.0])
@pytest.mark.parametrize(
    "name",
    [
        *("SGD", "AdamW"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Adam", "RMSprop", "Lion")),
    ],
)
def test_ends_well_from_a_start_decades_off(name: str, lr: float) -> None:
    """Better than chance (ln 2), where plain torch stays there or worse."""
    loss, opt = run(lambda n: getattr(st, name)(n.parameters(), lr=lr, total_steps=STEPS))
    assert loss < math.log(2)
    if name != "Lion":  # torch has none
        assert plain(name, lr) > loss
    assert opt.hparams["lr"] != lr


@pytest.mark.parametrize(
    "name",
    ["NAdam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Adafactor", "RAdam"))],
)
def test_optimizers_without_a_rule(name: str) -> None:
    """Tuned from the outside, from a rate a thousand times too low, where plain stays at chance."""
    assert plain(name, 1e-6) > 0.68
    inner = getattr(torch.optim, name)
    loss, opt = run(lambda n: st.SelfTuning(inner(n.parameters(), lr=1e-6), total_steps=STEPS))
    assert loss < 0.6
    assert opt.hparams["lr"] > 1e-5


def test_weight_decay_rises_where_a_network_overfits() -> None:
    """Known direction: 18 of 20 inputs are noise and 200 images are few."""
    _, opt = run(lambda n: st.AdamW(n.parameters(), lr=1e-3, total_steps=STEPS))
    assert opt.hparams["weight_decay"] > 0.1


def test_without_validation_the_rate_is_tuned_and_decay_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "selftune"):
        loss, opt = run(lambda n: st.AdamW(n, lr=1e-3, probe=False), hyper=False)
    assert opt.hparams["lr"] != 1e-3
    assert opt.hparams["weight_decay"] == pytest.approx(1e-2)
    assert loss < math.log(2)
    assert caplog.text.count("no hyper_step") == 1


def test_a_blown_up_run_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    """Started at a rate that overflows, without a sweep; said once, and never not finite."""
    with caplog.at_level(logging.WARNING, "selftune"):
        loss, opt = run(lambda n: st.SGD(n.parameters(), lr=1e4, probe=False))
    assert loss < math.log(2) + 0.05
    assert caplog.text.count("back to the last good weights") == 1
    assert opt.hparams["lr"] < 1e3


def test_an_explosion_cools_the_rate_and_momentum_more_each_time() -> None:
    """Law: 3, then 9, …, and a shorter memory; a loss that merely worsens halves the rate."""
    recorder = st.monitor.InMemory()
    options: dict[str, Any] = dict(lr=1e4, momentum=0.9, probe=False, log_dir=recorder)
    _, opt = run(lambda n: st.SGD(n.parameters(), **options), steps=30)
    opt.flush()
    count = recorder.curve("weights/rewinds")[1][-1]
    assert count >= 2
    assert opt.hparams["lr"] < 1e4 / 3**count
    assert opt.hparams["momentum"] < 0.8


def test_the_quadratic_best_rate_is_found_from_the_hypergradient_alone() -> None:
    """L = w²/2: the rate grows from far below towards 1, where one step is enough."""
    weight = nn.Parameter(torch.full((10,), 3.0))
    opt = st.SGD([weight], lr=1e-3, tune=("lr",), probe=False, average=st.Average(0.0), every=1)

    def loss() -> Tensor:
        return weight.square().sum() / 2

    for _ in range(150):
        opt.zero_grad()
        loss().backward()
        opt.step()
        opt.hyper_step(loss)
    assert 0.05 < opt.hparams["lr"] < 2.0
    assert float(loss().detach()) < 1e-3


def test_a_validation_loss_in_other_units_tunes_alike() -> None:
    """Law: only the direction of its gradient counts, also where its length changes on the way."""

    def ends(units: list[float]) -> dict[str, float]:
        weight = nn.Parameter(torch.full((10,), 3.0, dtype=torch.float64))
        opt = st.AdamW([weight], lr=1e-3, probe=False, guard=False, every=1)
        for unit in units:
            opt.zero_grad()
            (weight.square().sum() / 2).backward()
            opt.step()
            opt.hyper_step(lambda unit=unit: unit * (weight - 1).square().sum())
        return opt.hparams

    assert ends([2.0**-k for k in range(40)]) == pytest.approx(ends([1.0] * 40), rel=1e-12)
    assert ends([1.0] * 40)["lr"] > 2e-3


@pytest.mark.parametrize(
    ("name", "closed", "off"),
    [("SGD", False, 0.03), ("AdamW", False, 1e-4), ("SGD", True, 0.03), ("AdamW", True, 0.03)],
)
def test_weight_decay_follows_the_slope_of_the_validation_loss(
    name: str, closed: bool, off: float
) -> None:
    """Finite differences of torch's own optimizer, gradients given, of an outer gradient of 1.

    There is then no curvature to drop but that of SGD's penalty, ηλ of a weight a step. The closed
    form takes the weights as they are for those of all steps.
    """
    recorder = st.monitor.InMemory()

    def trained(make: type, decay: float, **options: Any) -> tuple[nn.Parameter, Any]:
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = make([weight], lr=0.05, weight_decay=decay, **options)
        for step in range(8):
            weight.grad = torch.randn(3, generator=torch.Generator().manual_seed(step)).double()
            opt.step()
        return weight, opt

    def outer(weight: torch.Tensor) -> torch.Tensor:
        return (weight - 0.3).square().sum()

    weight, opt = trained(
        getattr(st, name), 0.1, tune=("weight_decay",), every=8, probe=False, guard=False,
        estimator=st.Trace(1.0, closed_forms=closed), average=st.Average(0.0), log_dir=recorder,
    )  # fmt: skip
    opt.hyper_step(lambda: outer(weight))
    opt.flush()
    plain = getattr(torch.optim, name)
    low, high = (float(outer(trained(plain, 0.1 * math.exp(z))[0].detach())) for z in (-1e-4, 1e-4))
    found = recorder.curve("hypergrad/weight_decay/value")[1][0]
    length = 2 * float((weight.detach() - 0.3).norm())
    assert found == pytest.approx((high - low) / 2e-4 / length, rel=off)
