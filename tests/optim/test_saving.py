"""Saved runs. Truth: the uninterrupted run, bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
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


@pytest.mark.parametrize(
    ("stop", "via"), [(3, copy.deepcopy), (14, by_pickle), (60, by_torch_save)]
)
@pytest.mark.parametrize("kind", MAKES)
def test_resumes_bit_for_bit(kind: str, stop: int, via: Callable) -> None:
    """In the probe and after hyper steps, into a fresh model and optimizer."""
    make, norm, options = MAKES[kind]
    dtype, hyper = options.get("dtype", torch.float32), options.get("hyper", 1)
    net = network(norm, dtype)
    opt = make(net)
    train(net, opt, range(stop), hyper)
    model, state, then = copy.deepcopy(net.state_dict()), via(opt.state_dict()), snapshot(net, opt)
    train(net, opt, range(stop, 75), hyper)
    again = network(norm, dtype)
    again.load_state_dict(model)
    resumed = make(again)
    resumed.load_state_dict(state)
    if not norm:
        check_equal(snapshot(again, resumed), then)
    train(again, resumed, range(stop, 75), hyper)
    check_equal(snapshot(again, resumed), snapshot(net, opt))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "norm, module"])
def test_resumes_through_distributed_checkpoint(kind: str, flatten: bool) -> None:
    make, norm, _ = MAKES[kind]
    net = network(norm)
    opt = make(net)
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flatten)
    train(net, opt, range(60))
    state = copy.deepcopy(checkpoint.get_optimizer_state_dict(net, opt, options=options))
    again = network(norm)
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    train(net, opt, range(60, 90))
    resumed = make(again)
    checkpoint.set_optimizer_state_dict(again, resumed, state, options=options)
    train(again, resumed, range(60, 90))
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
    train(net, opt, range(40, 60), hyper)
    train(again, resumed, range(40, 60), hyper)
    check_equal(snapshot(again, resumed), snapshot(net, opt))
