"""Closures with unusual graphs, threads and models. Truth: the loop without them."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

import selftune as st

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Reversible(torch.autograd.Function):
    """Computes a layer again in its backward pass, which calls ``backward`` within."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs.detach())
        with torch.no_grad():
            return layer(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        inputs = ctx.saved_tensors[0].requires_grad_()
        with torch.enable_grad():
            outputs = ctx.layer(inputs)
        torch.autograd.backward(outputs, grads)
        return inputs.grad, None


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(nn.Linear(5, width), inner, nn.Linear(width, 1))


@pytest.mark.parametrize("width", [16, 128], ids=["all weights tracked", "slices"])
def test_reversible_layers_give_the_same_hyperparameters(width: int) -> None:
    """Twin: without them; the gradients of the training loop stay as they are."""
    values = []
    for reversible in (False, True):
        net = network(width)

        def loss(net: nn.Sequential = net, reversible: bool = reversible) -> Tensor:
            inputs = net[0](X)
            hidden = Reversible.apply(inputs, net[1]) if reversible else net[1](inputs)
            return mse_loss(net[2](hidden), Y)

        opt = st.AdamW(net, lr=0.01, total_steps=60, every=2, probe=False)
        for _ in range(40):
            loss().backward()
            opt.step()
            opt.zero_grad()
            opt.hyper_step(loss)
            assert all(p.grad is None for p in net.parameters())
        values.append(opt.hparams)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0]["lr"] != 0.01


def test_models_of_other_threads_are_left_alone() -> None:
    """Law: BatchNorm counts its batches."""
    net, other = network(), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    opt = st.SGD(net, lr=0.01, every=1, probe=False)

    def loss() -> Tensor:
        thread = threading.Thread(target=other, args=(X,))
        thread.start()
        thread.join()
        return mse_loss(net(X), Y)

    for calls in range(1, 5):
        opt.zero_grad()
        mse_loss(net(X), Y).backward()
        opt.step()
        opt.hyper_step(loss)
        assert other[1].num_batches_tracked >= calls


def test_a_generator_may_be_trained_on_outputs_from_before_the_critics_hyper_step() -> None:
    """Law: as in the loop without ``hyper_step``, its BatchNorm does not change in between."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    critic = network()
    ours, theirs = (st.Adam(net, lr=1e-3, probe=False, every=1) for net in (generator, critic))

    def critical() -> Tensor:
        return softplus(-critic(X)).mean() + softplus(critic(generator(torch.randn(8, 4)))).mean()

    for _ in range(3):
        theirs.zero_grad()
        critical().backward()
        theirs.step()
        fake = generator(torch.randn(8, 4))
        theirs.hyper_step(critical)
        ours.zero_grad()
        softplus(-critic(fake)).mean().backward()
        ours.step()


def test_a_closure_that_freezes_all_parameters_is_named() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1))
    opt = st.SGD(net[1], lr=0.01, every=1, probe=False)
    mse_loss(net(X), Y).backward()
    opt.step()

    def loss() -> Tensor:
        net[1].requires_grad_(False)
        return mse_loss(net(X), Y)

    with pytest.raises(ValueError, match="does not depend on any of this optimizer's parameters"):
        opt.hyper_step(loss)


def ensemble(kind: str, *, stacked: bool) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Parameters and loss of three networks, with ``torch.func`` or one by one."""
    nets = [network(4) for _ in range(3)]
    for net in nets:
        net.append(nn.BatchNorm1d(1) if kind == "norm" else nn.Identity())
        net.register_buffer("scale", torch.ones(1))
    params, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    each = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (X,)))

    def loss() -> Tensor:
        out = each(params, buffers) if stacked else torch.stack([net(X) for net in nets])
        return mse_loss(out, Y.expand_as(out))

    return [*params.values()] if stacked else [p for n in nets for p in n.parameters()], loss


@pytest.mark.parametrize("kind", ["buffer", "norm"])
def test_ensembles_of_torch_func_are_trained(kind: str) -> None:
    """Twin: the same networks, called one by one."""
    rates = []
    for stacked in (True, False):
        params, loss = ensemble(kind, stacked=stacked)
        opt = st.SGD(params, lr=0.01, every=2, probe=False)
        for _ in range(12):
            opt.zero_grad()
            loss().backward()
            opt.step()
            opt.hyper_step(loss)
        rates.append(opt.hparams["lr"])
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)
    assert rates[0] != 0.01


def test_a_closure_may_call_the_model_with_other_buffers() -> None:
    """Law: the model keeps its own, and their values."""
    net = nn.Sequential(network(), nn.BatchNorm1d(1))
    net.register_buffer("scale", torch.ones(1))
    others = {name: buffer + 5 for name, buffer in net.named_buffers()}
    opt = st.SGD(net.parameters(), lr=0.01, every=1, probe=False)

    def loss() -> Tensor:
        state = {**dict(net.named_parameters()), **others}
        return mse_loss(torch.func.functional_call(net, state, (X,)), Y)

    for _ in range(3):
        mse_loss(net(X), Y).backward()
        opt.step()
        own = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
        opt.hyper_step(loss)
        for name, buffer in net.named_buffers():
            assert buffer is own[name][0]
            assert torch.equal(buffer, own[name][1])


def test_statistics_of_a_functional_model_are_those_of_training() -> None:
    """``functional_call`` with the loop's own. Truths: the loop without a closure, and the run."""

    def trained(hyper: bool, resume: bool = False) -> dict[str, Tensor]:
        net = nn.Sequential(network(), nn.BatchNorm1d(1))
        params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
        buffers = {n: b.clone() for n, b in net.named_buffers()}

        def made() -> st.SGD:
            return st.SGD(params.values(), lr=0.01, every=1, probe=False, tune=(), guard=False)

        def loss(shift: float = 0.0) -> Tensor:
            out = torch.func.functional_call(net, (params, buffers), (X + shift,))
            return mse_loss(out, Y)

        opt = made()
        for step in range(6):
            opt.zero_grad()
            loss().backward()
            opt.step()
            if step == 3 and resume:
                state, opt = opt.state_dict(), made()
                opt.load_state_dict(state)
            if hyper:
                opt.hyper_step(lambda: loss(50.0))
        return buffers

    want = trained(False)
    for found in (trained(True), trained(True, resume=True)):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value)
