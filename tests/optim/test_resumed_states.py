"""States at unusual moments, or changed by hooks. Truths: the run itself, torch."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

import selftune as st

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    middle = nn.BatchNorm1d(4) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 1))


def step(net: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    F.mse_loss(net(X), Y).backward()
    opt.step()
    opt.hyper_step(lambda: F.mse_loss(net(X), Y))


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    others = other.state_dict()
    return [
        name for name, value in one.state_dict().items() if not torch.equal(value, others[name])
    ]


@pytest.mark.parametrize("warm", ["linear", "cycle", "used"])
def test_a_scheduler_that_ended_the_sweep_is_remembered(warm: str) -> None:
    """The sweep went on after the resume, at 200 times the rate. Truth: the run itself."""

    def make() -> tuple[Any, Any, Any]:
        net = network()
        opt = st.AdamW(net.parameters(), lr=1e-3)
        if warm == "cycle":
            return net, opt, schedulers.OneCycleLR(opt, 1e-2, total_steps=6)
        return net, opt, schedulers.LinearLR(opt, 0.1, total_iters=5)

    def epoch(net: nn.Module, opt: Any, scheduler: Any) -> None:
        for _ in range(10):
            step(net, opt)
        scheduler.step()

    run = make()
    epoch(*run)
    saved = copy.deepcopy([part.state_dict() for part in run])
    other = make()
    if warm == "used":  # it must not remember its own past
        for _ in range(3):
            epoch(*other)
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    for _ in range(3):
        epoch(*run)
        epoch(*other)
        assert run[1].hparams == other[1].hparams
        assert run[1].param_groups[0]["applied_lr"] == other[1].param_groups[0]["applied_lr"]
    assert differences(run[0], other[0]) == []


def test_cleared_state_of_another_optimizer_stays_cleared() -> None:
    """Saved at every step, also right after the sweep's return. Truth: the run itself."""

    def make() -> tuple[nn.Module, Any]:
        net = network()
        return net, st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=1e-3), total_steps=100)

    run, states = make(), []
    for _ in range(40):
        step(*run)
        states.append(copy.deepcopy([part.state_dict() for part in run]))
    cleared = [
        i for i, (_, s) in enumerate(states) if not any("inner" in e for e in s["state"].values())
    ]
    assert cleared  # the sweep has gone back
    for at in (cleared[0], 30):
        for used in (False, True):
            net, opt = make()
            if used:
                step(net, opt)
            net.load_state_dict(states[at][0])
            opt.load_state_dict(states[at][1])
            step(net, opt)
            expected = states[at + 1][0]
            assert all(torch.equal(v, expected[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize("norm", [False, True])
def test_states_that_are_saved_again_before_training_goes_on(norm: bool) -> None:
    """Saved in ``averaged()``, the optimizer's loaded first. Truth: the training weights."""

    def make() -> tuple[nn.Module, Any]:
        net = network(norm)
        return net, st.SGD(net, lr=0.01, momentum=0.9, total_steps=60)

    net, opt = make()
    for _ in range(20):
        step(net, opt)
    with opt.averaged():
        saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    second, its = make()
    its.load_state_dict(saved[1])
    second.load_state_dict(saved[0])
    again = copy.deepcopy((second.state_dict(), its.state_dict()))
    copied, copied_opt = copy.deepcopy((second, its))
    third, third_opt = make()
    third.load_state_dict(again[0])
    third_opt.load_state_dict(again[1])
    its.train()
    copied_opt.train()
    for other in (second, copied, third):
        assert differences(net, other) == []


def by_name(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
    """As in torch's documentation: the state in the order of the optimizer's own parameters."""
    state = copy.deepcopy(state)
    own, group = opt.param_groups[0], state["param_groups"][0]
    place = dict(zip(group["param_names"], group["params"], strict=True))
    order = range(len(own["params"]))
    entries = dict(state["state"])
    state["state"] = {i: entries[place[n]] for i, n in zip(order, own["param_names"], strict=True)}
    group["params"], group["param_names"] = [*order], own["param_names"]
    return state


@pytest.mark.parametrize("ours", [False, True])
def test_hooks_see_and_change_the_complete_state(ours: bool) -> None:
    """Truth: torch's own optimizer with the same hooks."""

    def make(net: nn.Module, reverse: bool) -> Any:
        named = [(n, p) for n, p in net.named_parameters() if p.shape == (4, 4)][
            :: -1 if reverse else 1
        ]
        return st.AdamW(named, probe=False) if ours else torch.optim.AdamW(named)

    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    net = build()
    opt = make(net, False)
    for _ in range(5):
        opt.zero_grad()
        net(X).square().mean().backward()
        opt.step()
    file, called = io.BytesIO(), []
    opt.register_state_dict_post_hook(lambda _, state: torch.save(state, file))
    saved = copy.deepcopy(opt.state_dict())
    file.seek(0)
    other = build()
    its = make(other, True)
    its.register_load_state_dict_pre_hook(by_name)
    its.register_load_state_dict_post_hook(lambda _: called.append(its.state[other[1].weight]))
    for state in (saved, torch.load(file)):
        its.load_state_dict(state)
        for one, two in zip(net, other, strict=True):
            moments: list[Tensor] = [
                o.state[p]["exp_avg"] for o, p in ((opt, one.weight), (its, two.weight))
            ]
            assert torch.equal(*moments)
    assert [set(entry) >= {"exp_avg"} for entry in called] == [True, True]
    opt.register_state_dict_post_hook(lambda _, state: {"optimizer": state})
    assert [*opt.state_dict()] == ["optimizer"]


def test_the_given_value_is_that_of_the_run() -> None:
    """A resumed run ignores another rate. Truth: the explanation of the run itself."""
    net = network()
    opt = st.AdamW(net.parameters(), lr=1e-3, total_steps=60)
    for _ in range(40):
        step(net, opt)
    other = st.AdamW(network().parameters(), lr=0.1, total_steps=60)
    other.load_state_dict(opt.state_dict())
    assert other.explain().splitlines() == opt.explain().splitlines()
    assert other.explain().startswith("lr: given 0.001 →")


def test_layers_that_were_frozen_during_the_run() -> None:
    """A resume with the layer frozen from the start, as torch allows. Truth: the run itself."""

    def make() -> tuple[nn.Module, Any]:
        net = network()
        return net, st.AdamW(net.parameters(), lr=1e-2, total_steps=90)

    net, opt = make()
    for _ in range(40):
        step(net, opt)
    net[0].requires_grad_(False)
    for _ in range(10):
        step(net, opt)
    again, resumed = make()
    again[0].requires_grad_(False)
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(40):
        step(net, opt)
        step(again, resumed)
    assert not differences(net, again)
    assert opt.hparams == resumed.hparams
    with opt.averaged(), resumed.averaged():
        assert not differences(net, again)
