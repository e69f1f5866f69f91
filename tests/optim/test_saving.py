"""Saved runs. Truth: the uninterrupted run, bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st


def network(norm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.1)) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 2)).to(dtype)


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: range, hyper: int = 1) -> None:
    dtype = net[0].weight.dtype
    for step in steps:
        torch.manual_seed(step)
        x, xv = torch.randn(2, 16, 4).to(dtype)
        opt.zero_grad()
        cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
        opt.step()
        if hyper and step % hyper == 0:
            opt.hyper_step(lambda xv=xv: cross_entropy(net(xv), (xv.sum(1) > 0).long()))


def snapshot(net: nn.Module, opt: Any) -> dict[str, Tensor]:
    with opt.averaged():
        shown = {f"averaged {k}": v.clone() for k, v in net.state_dict().items()}
    hparams = {k: torch.tensor(v) for k, v in opt.hparams.items()}
    hparams["shown lr"] = torch.tensor(opt.param_groups[0]["lr"])
    return shown | hparams | {k: v.clone() for k, v in net.state_dict().items()}


def check_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def by_torch_save(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_pickle(state: dict) -> dict:
    return pickle.loads(pickle.dumps(state))


MAKES: dict[str, tuple[Callable, bool, dict]] = {
    "sgd": (lambda n: st.SGD(n.parameters(), lr=0.02, momentum=0.5), False, {}),
    "adam horizon": (lambda n: st.Adam(n.parameters(), total_steps=75), False, {}),
    "per tensor": (lambda n: st.AdamW(n.parameters(), per="tensor", probe=False), False, {}),
    "l1": (lambda n: st.RMSprop(n.named_parameters(), l1=1e-4, tune=("lr", "l1")), False, {}),
    "wrapper": (lambda n: st.SelfTuning(torch.optim.NAdam(n.parameters())), False, {}),
    "alone": (lambda n: st.Lion(n.parameters(), probe=False), False, dict(hyper=0)),
    "bfloat16": (lambda n: st.Adam(n.parameters()), False, dict(dtype=torch.bfloat16)),
    "norm, module": (lambda n: st.SGD(n, lr=0.02), True, {}),
    "norm, rarely": (lambda n: st.SGD(n, lr=0.02, probe=False), True, dict(hyper=9)),
    "norm, parameters": (lambda n: st.SGD(n.parameters(), lr=0.02), True, {}),
}


STOPS: dict[int, Callable] = {3: copy.deepcopy, 14: by_pickle, 60: by_torch_save}


@cache
def saved(kind: str) -> tuple[dict[int, tuple[Any, ...]], dict[str, Tensor]]:
    """States of a run at each stop, and the run's end."""
    make, norm, options = MAKES[kind]
    net = network(norm, options.get("dtype", torch.float32))
    opt, begin, states = make(net), 0, {}
    for stop, via in STOPS.items():
        train(net, opt, range(begin, stop), options.get("hyper", 1))
        model, state = copy.deepcopy(net.state_dict()), via(opt.state_dict())
        states[stop] = model, state, snapshot(net, opt)
        begin = stop
    train(net, opt, range(begin, 75), options.get("hyper", 1))
    return states, snapshot(net, opt)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", MAKES)
def test_resumes_bit_for_bit(kind: str, stop: int) -> None:
    """In the sweep and after hyper steps, into a fresh model and optimizer."""
    make, norm, options = MAKES[kind]
    dtype, hyper = options.get("dtype", torch.float32), options.get("hyper", 1)
    states, end = saved(kind)
    model, state, then = states[stop]
    again = network(norm, dtype)
    again.load_state_dict(model)
    resumed = make(again)
    resumed.load_state_dict(state)
    if not norm:
        check_equal(snapshot(again, resumed), then)
    train(again, resumed, range(stop, 75), hyper)
    check_equal(snapshot(again, resumed), end)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "norm, module"])
def test_resumes_through_distributed_checkpoint(kind: str, flatten: bool) -> None:
    make, norm, _ = MAKES[kind]
    net = network(norm)
    opt = make(net)
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flatten)
    train(net, opt, range(30))
    state = copy.deepcopy(checkpoint.get_optimizer_state_dict(net, opt, options=options))
    again = network(norm)
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    train(net, opt, range(30, 45))
    resumed = make(again)
    checkpoint.set_optimizer_state_dict(again, resumed, state, options=options)
    train(again, resumed, range(30, 45))
    check_equal(snapshot(again, resumed), snapshot(net, opt))


@pytest.mark.parametrize(
    ("kind", "via"), [*((k, copy.deepcopy) for k in MAKES), ("norm, module", by_pickle)]
)
def test_a_copied_optimizer_continues_bit_for_bit(kind: str, via: Callable) -> None:
    """Copied together with its model, as torch's own optimizers can be."""
    make, norm, options = MAKES[kind]
    dtype, hyper = options.get("dtype", torch.float32), options.get("hyper", 1)
    net = network(norm, dtype)
    opt = make(net)
    train(net, opt, range(40), hyper)
    again, resumed = via((net, opt))
    train(net, opt, range(40, 52), hyper)
    train(again, resumed, range(40, 52), hyper)
    check_equal(snapshot(again, resumed), snapshot(net, opt))


@pytest.mark.parametrize("whole", [True, False], ids=["model called", "its parts called"])
def test_a_resumed_run_asks_for_no_validation_batch_more(
    whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An optimizer of parameters finds BatchNorm again in training passes, not by the closure."""

    def go(net: nn.Module, opt: Any, steps: range) -> int:
        stream = iter(torch.randn(100, 16, 4, generator=torch.Generator().manual_seed(steps[0])))
        run = net if whole else lambda x: net[2](net[1](net[0](x)))
        for step in steps:
            torch.manual_seed(step)
            opt.zero_grad()
            run(torch.randn(16, 4)).square().mean().backward()
            opt.step()
            opt.hyper_step(lambda: (run(next(stream)) - 1).square().mean())
        return sum(1 for _ in stream)  # left

    nets = [network(norm=True) for _ in range(2)]
    opts = [st.SGD(n.parameters(), lr=0.02, total_steps=90) for n in nets]
    go(nets[0], opts[0], range(40))
    saved = copy.deepcopy((nets[0].state_dict(), opts[0].state_dict()))
    other = network(norm=True)  # not the optimizer's: its statistics are none of the run's
    nets[1].load_state_dict(saved[0])
    opts[1].load_state_dict(saved[1])
    other(torch.randn(16, 4))
    with opts[1].averaged(), torch.no_grad():  # looked at before anything is found
        nets[1].eval()(torch.randn(16, 4))
    nets[1].train()
    assert "Pass the model" in caplog.text
    left = [go(n, o, range(40, 90)) for n, o in zip(nets, opts, strict=True)]
    assert left[0] == left[1]
    check_equal(snapshot(nets[1], opts[1]), snapshot(nets[0], opts[0]))


def test_statistics_that_no_training_pass_found_are_found_by_the_closure() -> None:
    """A second BatchNorm that only validation runs: known to the saved run, not to training."""

    def go(net: nn.Module, extra: nn.Module, opt: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            opt.zero_grad()
            net(torch.randn(16, 4)).square().mean().backward()
            opt.step()
            opt.hyper_step(lambda: extra(net(torch.randn(16, 4))).square().mean())

    nets = [network(norm=True) for _ in range(2)]
    extras = [nn.BatchNorm1d(2) for _ in range(2)]
    opts = [st.SGD(n.parameters(), lr=0.02, probe=False) for n in nets]
    go(nets[0], extras[0], opts[0], range(30))
    saved = copy.deepcopy([m.state_dict() for m in (nets[0], extras[0], opts[0])])
    for part, state in zip((nets[1], extras[1], opts[1]), saved, strict=True):
        part.load_state_dict(state)
    for net, extra, opt in zip(nets, extras, opts, strict=True):
        go(net, extra, opt, range(30, 60))
    check_equal(snapshot(nets[1], opts[1]), snapshot(nets[0], opts[0]))


@pytest.mark.parametrize("make", [st.AdamW, st.SGD])
def test_states_of_the_sweep_load_after_it(make: Any) -> None:
    net = network()
    opt = make(net.parameters(), lr=0.01, total_steps=100)
    states = {}
    for step in range(40):
        train(net, opt, range(step, step + 1))
        if opt.sweeping:
            states[step + 1] = copy.deepcopy((net.state_dict(), opt.state_dict()))
    ends = snapshot(net, opt)
    assert len(states) > 2
    assert not opt.sweeping
    for done, (weights, state) in states.items():
        net.load_state_dict(weights)
        opt.load_state_dict(state)
        assert opt.sweeping
        train(net, opt, range(done, 40))
        check_equal(snapshot(net, opt), ends)


class Branches:
    """Two branches with statistics of their own, which training and validation may call."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2)
        )
        self.opt = st.SGD(self.net.parameters(), lr=0.02, probe=False, total_steps=60)

    def loss(self, seed: int, order: tuple[int, ...]) -> Tensor:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        return sum((self.net[i](x + 3 * i) for i in order), torch.ones(16, 1)).square().mean()

    def train(self, steps: range, trained: tuple[int, ...], validated: tuple[int, ...]) -> None:
        for step in steps:
            self.opt.zero_grad()
            self.loss(step, trained).backward()
            self.opt.step()
            self.opt.hyper_step(lambda step=step: self.loss(1000 + step, validated))

    def resumed(self) -> "Branches":
        other = Branches()
        other.net.load_state_dict(self.net.state_dict())
        other.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
        return other


def test_statistics_are_those_of_their_layers_whatever_is_called_first() -> None:
    """Training calls the branches in another order than validation. Truth: the whole run."""
    job = Branches()
    job.train(range(30), (0, 1), (1, 0))
    other = job.resumed()
    for each in (job, other):
        each.train(range(30, 50), (0, 1), (1, 0))
    check_equal(snapshot(other.net, other.opt), snapshot(job.net, job.opt))


def test_saved_statistics_without_a_layer_are_named(caplog: pytest.LogCaptureFixture) -> None:
    job = Branches()
    job.train(range(10), (0, 1), (1, 0))
    other = job.resumed()
    other.train(range(10, 12), (0,), (0,))
    assert "BatchNorm layers are not those" in caplog.text
