"""Any optimizer of torch is tuned from outside, or refused. Truth: its own steps; descent."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import selftune as st

REFUSED = {
    "LBFGS": "evaluates the loss several times",
    "SparseAdam": "does not support dense gradients",
}
NAMES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 2, bias=False)
    return nn.Sequential(*layers)  # Muon takes matrices only


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return x, (x.sum(1) > 0).long()


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> float:
    for step in range(steps):
        x, y = batch(step)
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
        if isinstance(opt, st.SelfTuning):
            xv, yv = batch(10_000 + step)
            opt.hyper_step(lambda xv=xv, yv=yv: cross_entropy(net(xv), yv))
    with opt.averaged() if isinstance(opt, st.SelfTuning) else torch.no_grad():
        x, y = batch(-1)
        return cross_entropy(net(x), y).item()


@pytest.mark.parametrize("name", NAMES)
def test_tunes(name: str) -> None:
    net = network()
    inner = getattr(torch.optim, name)(net.parameters(), lr=1e-3)
    if name in REFUSED:
        with pytest.raises((TypeError, RuntimeError), match=REFUSED[name]):
            train(net, st.SelfTuning(inner), 2)
        return
    before = train(net, st.SelfTuning(inner), 0)
    opt = st.SelfTuning(inner, total_steps=150)
    after = train(net, opt, 150)
    assert after < 0.7 * before
    assert opt.hparams["lr"] != pytest.approx(1e-3)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in REFUSED])
def test_steps_as_the_inner_optimizer_where_nothing_is_tuned(name: str) -> None:
    ends = []
    for wrapped in (False, True):
        net = network()
        opt: Any = getattr(torch.optim, name)(net.parameters(), lr=1e-3)
        if wrapped:
            opt = st.SelfTuning(opt, tune=(), probe=False, guard=False)
        train(net, opt, 20)
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_an_optimizer_of_second_order_is_refused_by_name() -> None:
    class Newton(torch.optim.SGD):
        is_second_order = True

    with pytest.raises(TypeError, match="Newton needs second derivatives"):
        st.SelfTuning(Newton(network().parameters(), lr=0.1))


def test_no_rate_is_named() -> None:
    inner = torch.optim.SGD(network().parameters(), lr=0.1)
    inner.param_groups[0]["lr"] = None  # as transformers' Adafactor
    with pytest.raises(ValueError, match="inner=SGD has a parameter group without lr: pass a num"):
        st.SelfTuning(inner)


def test_tune_none_is_tune_left_out() -> None:
    found = [
        sorted(
            n for n in ("lr", "weight_decay") if f"{n}:" in st.SelfTuning(inner, **given).explain()
        )
        for given in ({}, {"tune": None})
        for inner in (torch.optim.SGD(network().parameters(), lr=0.1),)
    ]
    assert found == [["lr"], ["lr"]]


class Early(torch.optim.Optimizer):
    """Makes its state when it is created, as torch's Adagrad did up to version 2.11."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            size = self.state[p]["sum"].add_(p.grad**2).sqrt() + 1e-8
            p.addcdiv_(p.grad, size, value=-self.param_groups[0]["lr"])


def test_state_that_is_made_at_creation_survives_the_sweep() -> None:
    """Twin: torch's Adagrad, with the same steps."""
    ends = []
    for kind in (Early, torch.optim.Adagrad):
        net = network()
        opt = st.SelfTuning(kind(net.parameters(), lr=1e-3), total_steps=60)
        train(net, opt, 60)
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_training_gradients_alone_tune_alike_beside_an_unused_parameter(name: str) -> None:
    """Law: a parameter without a gradient changes nothing, though no step is then in place.

    Twin: the same run without it. The hyperparameters follow the gradient before the step.
    """
    ends = []
    for unused in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        params = [*net.parameters()]
        if unused:
            params.append(nn.Parameter(torch.ones(3, dtype=torch.float64)))
        inner = getattr(torch.optim, name)(params, lr=1e-2)
        opt = st.SelfTuning(inner, total_steps=300, every=5)
        generator = torch.Generator().manual_seed(1)
        for _ in range(250):
            x = torch.randn(16, 6, dtype=torch.float64, generator=generator)
            opt.zero_grad()
            mse_loss(net(x), x[:, :1].sin() + x[:, 1:2]).backward()
            opt.step()
        ends.append((opt.hparams["lr"], net[0].weight.detach().clone()))
    (rate, weight), (twin_rate, twin_weight) = ends
    assert rate != pytest.approx(1e-2, rel=0.05), "nothing was tuned"
    assert rate == pytest.approx(twin_rate, rel=1e-9)
    torch.testing.assert_close(weight, twin_weight, rtol=1e-9, atol=1e-9)
