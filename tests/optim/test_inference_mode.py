"""Calls under ``torch.inference_mode``. Truth: the same run without it, bit for bit."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st

MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda net: st.AdamW(net.parameters(), lr=0.01, total_steps=50),
    "NAdam": lambda net: st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=0.01)),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x[:, :2].sin()).square().mean()


def train(net: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        x, xv = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        loss_of(net, x).backward()
        opt.step()
        opt.hyper_step(lambda xv=xv: loss_of(net, xv))


def evaluate(net: nn.Module, opt: Any) -> None:
    net.eval()
    with opt.averaged():
        net(torch.ones(3, 4))
    opt.eval()
    net(torch.ones(3, 4))
    opt.train()
    net.train()


def unfreeze(net: nn.Module, opt: Any) -> None:
    net[0].requires_grad_(True)
    evaluate(net, opt)


def add_group(net: nn.Module, opt: Any) -> None:
    with torch.inference_mode(False):
        net.append(nn.Linear(2, 2))
    opt.add_param_group({"params": net[-1].parameters()})
    evaluate(net, opt)


def reload(net: nn.Module, opt: Any) -> None:
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    for target, state in zip((net, opt), saved, strict=True):
        target.load_state_dict(state)
    evaluate(net, opt)


def write_rate(net: nn.Module, opt: Any) -> None:
    opt.param_groups[0]["lr"] *= 0.5
    assert opt.hparams["lr"] > 0


LOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "evaluation": evaluate,
    "memory": lambda net, opt: (opt.memory(), opt.hparams, opt.explain()),
    "state_dict": lambda net, opt: (opt.state_dict(), copy.deepcopy(opt)),
    "load_state_dict": reload,
    "unfrozen layer": unfreeze,
    "added group": add_group,
    "written rate": write_rate,
}


def run(make: str, look: str, begun: int, mode: Any) -> list[Tensor]:
    net = network()
    net[0].requires_grad_(look != "unfrozen layer")
    opt = MAKES[make](net)
    train(net, opt, range(begun))
    with mode:
        LOOKS[look](net, opt)
    train(net, opt, range(begun, 50))
    with opt.averaged():
        averaged = [t.clone() for t in net.state_dict().values()]
    return [*averaged, *net.state_dict().values()]


@pytest.mark.parametrize("begun", [0, 30])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("make", MAKES)
def test_the_run_is_that_without_inference_mode(make: str, look: str, begun: int) -> None:
    seen = run(make, look, begun, torch.inference_mode())
    torch.testing.assert_close(seen, run(make, look, begun, nullcontext()), rtol=0, atol=0)


@pytest.mark.parametrize("make", MAKES)
def test_a_loaded_run_may_evaluate_first(make: str) -> None:
    """An optimizer over parameters finds the BatchNorm layers in the first forward pass."""
    ends = []
    for mode in (torch.inference_mode(), nullcontext()):
        net, other = network(), network()
        opt, loaded = MAKES[make](net), MAKES[make](other)
        train(net, opt, range(30))
        other.load_state_dict(net.state_dict())
        loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
        with mode:
            other.eval()(torch.ones(3, 4))
        train(other.train(), loaded, range(30, 50))
        with loaded.averaged():
            ends.append([t.clone() for t in other.state_dict().values()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)
