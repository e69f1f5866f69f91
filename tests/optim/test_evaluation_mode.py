"""eval() and train(), and states inside averaged(). Truth: the run that was never looked at."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: st.SGD(net, lr=0.02, momentum=0.9),
    "AdamW": lambda net: st.AdamW(net.parameters(), lr=0.01, total_steps=60),
    "NAdam": lambda net: st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=0.01)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def train(net: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x, xv = torch.randn(2, 16, 4)
        net.train()
        opt.train()
        opt.zero_grad()
        cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
        opt.step()
        opt.hyper_step(lambda xv=xv: cross_entropy(net(xv), (xv.sum(1) > 0).long()))


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def end(net: nn.Module, opt: Any) -> dict[str, Any]:
    found = {"hparams": opt.hparams, "training": weights(net)}
    with opt.averaged():
        return found | {"averaged": weights(net)}


def check(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKES)
def test_eval_is_averaged_until_train(name: str) -> None:
    ends = []
    for looks in (False, True):
        net = network()
        opt = MAKES[name](net)
        for start in range(0, 60, 15):
            train(net, opt, range(start, start + 15))
            if looks:
                with opt.averaged():
                    want = weights(net)
                before = weights(net)
                opt.eval()
                opt.eval()
                check(weights(net), want)
                with opt.averaged():
                    check(weights(net), want)
                check(weights(net), want)
                for call, given in ((opt.step, []), (opt.hyper_step, [print]), (opt.sync, [])):
                    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
                        call(*given)
                opt.train()
                opt.train()
                check(weights(net), before)
        ends.append(end(net, opt))
    check(*ends)


def by_torch_save(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("half", [10, 35])
@pytest.mark.parametrize("way", ["eval", "averaged"])
@pytest.mark.parametrize("name", MAKES)
def test_a_state_saved_at_averaged_weights_holds_the_training_weights(
    name: str, way: str, half: int
) -> None:
    net = network()
    opt = MAKES[name](net)
    train(net, opt, range(half))
    training = weights(net)
    if way == "eval":
        opt.eval()
        state = by_torch_save({"model": net.state_dict(), "opt": opt.state_dict()})
    else:
        with opt.averaged():
            state = by_torch_save({"model": net.state_dict(), "opt": opt.state_dict()})
    train(net, opt, range(half, 45))
    want = end(net, opt)
    for evaluating, model_first in ((False, True), (True, True), (False, False)):
        net = network()
        opt = MAKES[name](net)
        if evaluating:
            opt.eval()
        if model_first:
            net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        if not model_first:
            net.load_state_dict(state["model"])
            for call, given in ((opt.step, []), (opt.hyper_step, [print])):
                with pytest.raises(RuntimeError, match=r"call train\(\) first"):
                    call(*given)
            opt.train()
        got = weights(net)
        kept = {k: v for k, v in training.items() if "running" not in k and "num" not in k}
        check({k: got[k] for k in kept}, kept)  # statistics may wait for their layers
        train(net, opt, range(half, 45))
        check(end(net, opt), want)


def test_a_model_loaded_inside_averaged_is_refused_and_undone() -> None:
    net, other = network(), network()
    opt = st.SGD(net, lr=0.02)
    train(net, opt, range(30))
    before = weights(net)

    def inside() -> None:
        with opt.averaged():
            net.load_state_dict(other.state_dict())

    with pytest.raises(RuntimeError, match=r"changed after averaged\(\).*the training weights"):
        inside()
    check(weights(net), before)
    opt.eval()
    net.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"changed after eval\(\).*the training weights"):
        opt.train()
    check(weights(net), before)


def test_states_loaded_inside_averaged_are_kept() -> None:
    """Truth: the same loaded outside."""
    source = network()
    saved = st.SGD(source, lr=0.02)
    train(source, saved, range(40))
    state = copy.deepcopy({"model": source.state_dict(), "opt": saved.state_dict()})
    ends = []
    for inside in (False, True):
        net = network()
        opt = st.SGD(net, lr=0.05)
        train(net, opt, range(20))
        if inside:
            with opt.averaged():
                net.load_state_dict(state["model"])
                opt.load_state_dict(state["opt"])
        else:
            net.load_state_dict(state["model"])
            opt.load_state_dict(state["opt"])
        train(net, opt, range(40, 60))
        ends.append(end(net, opt))
    check(*ends)


def test_a_state_that_should_hold_training_weights_and_does_not_is_refused() -> None:
    """A distributed checkpoint is read into the keys of a state, which must be in eval mode."""
    net = network()
    opt = st.SGD(net, lr=0.02)
    train(net, opt, range(30))
    opt.eval()
    state = opt.state_dict()
    for entry in state["state"].values():
        entry.pop("training")
    opt.train()
    before = end(net, opt)
    with pytest.raises(ValueError, match="lacks its training weights"):
        opt.load_state_dict(state)
    check(end(net, opt), before)


def test_a_state_inside_the_closure_is_refused() -> None:
    net = network()
    opt = st.SGD(net, lr=0.02, probe=False)
    train(net, opt, range(3))

    def closure() -> Tensor:
        opt.state_dict()
        return net(torch.ones(2, 4)).square().mean()

    x = torch.randn(4, 4)
    for _ in range(40):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    with pytest.raises(RuntimeError, match="inside the closure"):
        opt.hyper_step(closure)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("name", MAKES)
def test_copies_made_in_evaluation_mode_train_on(name: str, how: str) -> None:
    """Truth: the original. Copies of tensors have other version counters."""
    net = network()
    opt = MAKES[name](net)
    train(net, opt, range(30))
    opt.eval()
    if how == "deepcopy":
        other, its = copy.deepcopy((net, opt))
    else:
        file = io.BytesIO()
        torch.save((net, opt), file)
        file.seek(0)
        other, its = torch.load(file, weights_only=False)
    train(net, opt, range(30, 40))
    train(other, its, range(30, 40))
    for key, value in weights(net).items():
        assert torch.equal(value, weights(other)[key]), key
    its.eval()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="weights were changed"):
        its.train()
