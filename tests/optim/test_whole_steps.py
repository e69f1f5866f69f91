"""Estimators of whole steps in the optimizers. Truths: autograd through a plain loop, torch."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.estimators import AbstractEstimator
from selftune.optim._following import Following

SEEING: dict[str, AbstractEstimator] = {
    "Forward": st.Forward(),
    "Unrolled": st.Unrolled(),
    "Unrolled, checkpoints": st.Unrolled(checkpoint=3),
}


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2)
    ).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(12, 3), draw(12, 2)) for _ in range(count)]


def trained(model: nn.Module, opt: Any, train: list[Any]) -> None:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for x, y in train:
        opt.step(functools.partial(closure, x, y))


@pytest.mark.parametrize("per", ["run", "tensor"])
@pytest.mark.parametrize("name", SEEING)
def test_hypergradients_are_those_of_a_plain_loop(
    name: str, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    before = Following.signal

    def signal(self: Following, block: Any, values: Any, grads: Tensor) -> Tensor:
        found = before(self, block, values, grads)
        seen.append((grads.clone(), found))
        return found

    monkeypatch.setattr(Following, "signal", signal)
    model, train = net(), batches(9)
    opt = st.SGD(
        model, lr=0.05, momentum=0.7, weight_decay=0.02, tune=("lr", "weight_decay"), every=8,
        estimator=SEEING[name], probe=False, per=per,
    )  # fmt: skip
    trained(model, opt, train[:8])
    opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))
    (grads, found), plain = seen[0], net()
    sizes = [p.numel() for p in plain.parameters()]
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    values = {"lr": 0.05, "weight_decay": 0.02}
    shape = () if per == "run" else (len(sizes),)
    logs = {n: torch.full(shape, v, dtype=torch.float64).log() for n, v in values.items()}

    def end(logs: dict[str, Tensor]) -> Tensor:
        h = {n: v.exp() if per == "run" else v.exp()[index] for n, v in logs.items()}
        named = dict(plain.named_parameters())
        w = torch.cat([p.detach().flatten() for p in named.values()])
        momentum = torch.zeros_like(w)
        for x, y in train[:8]:

            def loss(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                parts = [
                    part.view_as(p) for part, p in zip(w.split(sizes), named.values(), strict=True)
                ]
                held = {n: b.clone() for n, b in plain.named_buffers()}
                tensors = dict(zip(named, parts, strict=True)) | held
                return F.mse_loss(torch.func.functional_call(plain, tensors, (x,)), y)

            momentum = 0.7 * momentum + torch.func.grad(loss)(w) + h["weight_decay"] * w
            w = w - h["lr"] * momentum
        return w @ grads

    truth = torch.func.grad(end)(logs)
    size = max(float(t.abs().max()) for t in truth.values())
    for row, value in zip(found, truth.values(), strict=True):
        torch.testing.assert_close(row, value.reshape(-1), rtol=1e-5, atol=1e-7 * size)


@pytest.mark.parametrize("estimator", [st.Forward(), st.Unrolled(4), st.Implicit(through="update")])
def test_what_is_looked_at_in_passing_is_put_back(estimator: AbstractEstimator) -> None:
    """Weights, statistics and random numbers are those of torch's own optimizer."""
    one, other, train = net(dropout=0.5), net(dropout=0.5), batches(20)
    common = dict(lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(5)
    trained(other, torch.optim.SGD(other.parameters(), **common), train)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    opt = st.SGD(
        one, **common, tune=("lr", "weight_decay"), estimator=estimator, probe=False,
        every=10**6, guard=False,
    )  # fmt: skip
    trained(one, opt, train)
    assert torch.equal(torch.get_rng_state(), after)
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_closures_that_forget_their_batch_are_noticed() -> None:
    model, train = net(), batches(9)
    opt = st.SGD(model, lr=0.05, estimator=st.Unrolled(8), probe=False, every=8)
    for x, y in train[:8]:

        def closure() -> Tensor:
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)  # noqa: B023 - the mistake
            loss.backward()
            return loss

        opt.step(closure)
    with pytest.raises(RuntimeError, match="must keep its own batch"):
        opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))


def test_a_step_without_closure_is_refused() -> None:
    model = net()
    opt = st.SGD(model, lr=0.05, estimator=st.Forward())
    model(torch.ones(4, 3).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        opt.step()


def test_several_groups_are_refused() -> None:
    model = net()
    groups = [{"params": [p]} for p in model.parameters()]
    opt = st.SGD(groups, lr=0.05, estimator=st.Forward())
    with pytest.raises(ValueError, match="6 parameter groups"):
        trained(model, opt, batches(1))


def test_optimizers_from_outside_are_refused() -> None:
    inner = torch.optim.NAdam(net().parameters())
    with pytest.raises(ValueError, match="needs a rule of the library"):
        st.SelfTuning(inner, estimator=st.Forward())


def test_copies_and_saved_states_go_on() -> None:
    """They begin to follow anew, and their weights move as before."""
    model, train = net(), batches(12)
    opt = st.SGD(model, lr=0.05, estimator=st.Unrolled(4), probe=False, every=10**6)
    trained(model, opt, train[:6])
    again, other = net(), copy.deepcopy(opt)
    again.load_state_dict(model.state_dict())
    loaded = st.SGD(again, lr=0.05, estimator=st.Unrolled(4), probe=False, every=10**6)
    loaded.load_state_dict(opt.state_dict())
    trained(model, opt, train[6:])
    trained(again, loaded, train[6:])
    assert other.hparams == opt.hparams
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
