"""States of another run are refused whole. Truth: a run that was never offered one."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def train(net: nn.Module, opt: st.SGD, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x, xv = torch.randn(2, 16, 4)
        opt.zero_grad()
        cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
        opt.step()
        opt.hyper_step(lambda xv=xv: cross_entropy(net(xv), (xv.sum(1) > 0).long()))


def snapshot(net: nn.Module, opt: st.SGD) -> dict[str, Tensor]:
    hparams = {k: torch.tensor(v) for k, v in opt.hparams.items()}
    with opt.averaged():
        shown = {f"averaged {k}": v.clone() for k, v in net.state_dict().items()}
    return shown | hparams | {k: v.clone() for k, v in net.state_dict().items()}


def groups_of(net: nn.Module) -> list[dict]:
    return [{"params": net[0].parameters()}, {"params": net[2].parameters()}]


OTHERS = {
    "rule": lambda n: st.Adam(n.parameters()),
    "tuned": lambda n: st.SGD(n.parameters(), tune=("lr",)),
    "per group": lambda n: st.SGD(n.parameters(), per="group"),
    "shape": lambda n: st.SGD(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2))),
    "groups": lambda n: st.SGD(groups_of(n)),
    "size": lambda n: st.SGD(n[0].parameters()),
    "plain torch": lambda n: torch.optim.SGD(n.parameters(), momentum=0.9),
}


@cache
def undisturbed() -> dict[str, Tensor]:
    net = network()
    opt = st.SGD(net.parameters(), lr=0.02)
    train(net, opt, range(80))
    return snapshot(net, opt)


@pytest.mark.parametrize("kind", OTHERS)
def test_an_unfitting_state_is_refused_whole(kind: str) -> None:
    net, other = network(), network()
    foreign = OTHERS[kind](other)
    for group in foreign.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    foreign.step()
    net = network()
    opt = st.SGD(net.parameters(), lr=0.02)
    train(net, opt, range(60))
    with pytest.raises(ValueError, match="state_dict"):
        opt.load_state_dict(foreign.state_dict())
    train(net, opt, range(60, 80))
    torch.testing.assert_close(snapshot(net, opt), undisturbed(), rtol=0, atol=0)


@contextmanager
def run_of(state: dict) -> Iterator[dict]:
    """What is not of a parameter, to be changed."""
    group = state["param_groups"][0]
    run = torch.load(io.BytesIO(group["selftune"]), weights_only=True)
    yield run
    file = io.BytesIO()
    torch.save(run, file)
    group["selftune"] = file.getvalue()


def without_a_clock(state: dict) -> None:
    with run_of(state) as run:
        del run["clock"]


def without_shifts(state: dict) -> None:
    with run_of(state) as run:
        del run["shifts"]["state"]["raw"]


def of_another_type(state: dict) -> None:
    with run_of(state) as run:
        run["displacement"]["squares"] = 3.0


def cut_off(state: dict) -> None:
    group = state["param_groups"][0]
    group["selftune"] = group["selftune"][:-100]


def empty(state: dict) -> None:
    state["state"] = {}


def without_an_average(state: dict) -> None:
    state["state"][1] = {k: v for k, v in state["state"][1].items() if k != "average"}


def without_good_statistics(state: dict) -> None:
    with run_of(state) as run:
        del run["buffers"]["good"]


def without_written_values(state: dict) -> None:
    with run_of(state) as run:
        del run["groups"]["_shown"]


def without_momentum(state: dict) -> None:
    state["state"][1] = {k: v for k, v in state["state"][1].items() if k != "momentum_buffer"}


def flipped(state: dict) -> None:
    """A bit of the clock, or of another tensor."""
    group = state["param_groups"][0]
    packed = bytearray(group["selftune"])
    at = packed.index(b"data.pkl") + 200
    packed[at] ^= 4
    group["selftune"] = bytes(packed)


@pytest.mark.parametrize(
    "damage",
    [
        without_a_clock, without_shifts, of_another_type, cut_off, empty, without_an_average,
        without_good_statistics, without_written_values, without_momentum, flipped,
    ],
)  # fmt: skip
def test_a_state_that_is_not_whole_is_refused_whole(damage: Callable[[dict], None]) -> None:
    net, source = network(), network()
    opt, saved = st.SGD(net.parameters(), lr=0.02), st.SGD(source.parameters(), lr=0.05)
    train(net, opt, range(60))
    train(source, saved, range(60))
    state = saved.state_dict()
    damage(state)
    before, groups = snapshot(net, opt), [dict(g) for g in opt.param_groups]
    with pytest.raises(ValueError, match="state_dict is incomplete: "):
        opt.load_state_dict(state)
    torch.testing.assert_close(snapshot(net, opt), before, rtol=0, atol=0)
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in groups]


def test_a_layer_frozen_when_saved_is_to_be_frozen_before_loading() -> None:
    """Truth: the run that was not interrupted; its layer is unfrozen afterwards in both."""
    net, again = network(), network()
    net[0].requires_grad_(False)
    opt, resumed = st.SGD(net, lr=0.02), st.SGD(again, lr=0.02)
    train(net, opt, range(60))
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    again.load_state_dict(weights)
    with pytest.raises(ValueError, match=r"no state of parameter 0.*freeze it before"):
        resumed.load_state_dict(state)
    resumed = st.SGD(again, lr=0.02)
    again[0].requires_grad_(False)
    resumed.load_state_dict(state)
    for which, optimizer in ((net, opt), (again, resumed)):
        which[0].requires_grad_(True)
        train(which, optimizer, range(60, 120))
    torch.testing.assert_close(snapshot(again, resumed), snapshot(net, opt), rtol=0, atol=0)


def test_tensors_of_another_shape_are_refused_whole() -> None:
    net, source = network(), network()
    opt, saved = st.SGD(net.parameters(), lr=0.02), st.SGD(source.parameters(), lr=0.05)
    train(net, opt, range(60))
    train(source, saved, range(60))
    before = snapshot(net, opt)
    for name in ("momentum_buffer", "good"):
        state = saved.state_dict()
        state["state"][1] = state["state"][1] | {name: torch.zeros(3)}
        with pytest.raises(ValueError, match=f"its shape of {name} of parameter 1"):
            opt.load_state_dict(state)
    torch.testing.assert_close(snapshot(net, opt), before, rtol=0, atol=0)


SETTINGS = {
    "schedule": dict(schedule="cosine", total_steps=80),
    "bounds": dict(bounds={"lr": (1e-5, 1.0)}),
    r"settings\.unit_gradient": dict(settings=st.method.MethodSettings(unit_gradient=False)),
    r"average\.rho": dict(average=st.Average(0.9)),
    r"guard\.patience": dict(guard=st.control.GuardPolicy(patience=5)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_of_other_settings_is_refused_by_their_name(name: str) -> None:
    net, other = network(), network()
    opt, foreign = st.SGD(net, lr=0.02), st.SGD(other, lr=0.02, **SETTINGS[name])
    train(net, opt, range(60))
    train(other, foreign, range(60))
    before = snapshot(net, opt)
    with pytest.raises(ValueError, match=f"another run: .*{name} is .* there and .* here"):
        opt.load_state_dict(foreign.state_dict())
    torch.testing.assert_close(snapshot(net, opt), before, rtol=0, atol=0)


def test_a_state_of_another_version_is_refused_by_name() -> None:
    """Law: the message names both versions, and nothing is touched."""
    net = network()
    opt = st.SGD(net.parameters(), lr=0.02)
    train(net, opt, range(60))
    state = opt.state_dict()
    with run_of(state) as run:
        mine, run["version"] = run["version"], 7
    before = snapshot(net, opt)
    with pytest.raises(ValueError, match=f"version 7, but this selftune reads version {mine}"):
        opt.load_state_dict(state)
    torch.testing.assert_close(snapshot(net, opt), before, rtol=0, atol=0)


MAKERS: dict[str, Any] = {
    "none": None,
    "SGD": lambda raw: torch.optim.SGD(raw, 0.1),
    "Adam": lambda raw: torch.optim.Adam(raw, 0.1),
}


@pytest.mark.parametrize(("saved", "loads"), [("none", "SGD"), ("SGD", "none"), ("SGD", "Adam")])
def test_another_hyper_optimizer_is_refused_whole(saved: str, loads: str) -> None:
    """Some failed after groups and state were overwritten, others went on with another one."""
    source, net = network(), network()
    first = st.SGD(source, lr=0.05, hyper_optimizer=MAKERS[saved])
    train(source, first, range(60))
    opt = st.SGD(net, lr=0.02, hyper_optimizer=MAKERS[loads])
    train(net, opt, range(5))
    before = snapshot(net, opt)
    with pytest.raises(ValueError, match="its hyper_optimizer is"):
        opt.load_state_dict(first.state_dict())
    torch.testing.assert_close(snapshot(net, opt), before, rtol=0, atol=0)
