"""Modules that a run meets late, and what copies and resumed runs know of them.

Truths: counts of training passes by hand, the same run with the model passed, uninterrupted runs.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
Y = X.sin().sum(1, keepdim=True)


class Normaliser(nn.Module):
    """Divides by a running mean square in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.count += 1
                self.mean += (x.mean(0) - self.mean) / self.count
        return (x - self.mean) * self.scale


@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(16), Normaliser])
@pytest.mark.parametrize("given", [True, False])
def test_a_closure_may_alternate_between_modules(layer: Callable[[], Any], given: bool) -> None:
    """Count: 40 training passes of each; those of validation belong to the average."""
    body = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
    norms = nn.ModuleList([layer(), layer()])
    net = nn.ModuleDict({"body": body, "norms": norms, "head": nn.Linear(16, 1)})
    opt = st.AdamW(net if given else net.parameters(), lr=0.01, probe=False, guard=False)
    calls = 0

    def loss(x: Tensor, y: Tensor, task: int) -> Tensor:
        return F.mse_loss(net["head"](norms[task](body(x))), y)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss(X[200:] + 3, Y[200:], calls % 2)

    for _ in range(40):
        opt.zero_grad()
        (loss(X[:200], Y[:200], 0) + loss(X[:200], Y[:200], 1)).backward()
        opt.step()
        opt.hyper_step(closure)
    assert calls > 3
    counts = [int(dict(norm.named_buffers()).popitem()[1]) for norm in norms]
    assert counts == [40, 40]


def test_heads_that_closures_use_late_resume() -> None:
    """Truth: the uninterrupted run; the checkpoint lies between the first passes of two heads."""

    def make() -> tuple[nn.ModuleDict, st.AdamW]:
        torch.manual_seed(0)
        norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(16)])
        net = nn.ModuleDict({"body": nn.Linear(6, 16), "norms": norms, "head": nn.Linear(16, 1)})
        return net, st.AdamW(net.parameters(), lr=0.01, probe=False, guard=False, every=5)

    def go(net: nn.ModuleDict, opt: st.AdamW, steps: range) -> None:
        def loss(x: Tensor, y: Tensor, task: int) -> Tensor:
            return F.mse_loss(net["head"](net["norms"][task](net["body"](x))), y)

        for step in steps:
            opt.zero_grad()
            task = int(step > 12)
            (loss(X[:200], Y[:200], 0) + loss(X[:200], Y[:200], 1)).backward()
            opt.step()
            opt.hyper_step(lambda task=task: loss(X[200:] + 3, Y[200:], task))

    run, again = make(), make()
    go(*run, range(12))
    for part, other in zip(run, again, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    shown = []
    for net, opt in (run, again):
        go(net, opt, range(12, 40))
        assert int(net["norms"][1].num_batches_tracked) == 40
        with opt.averaged():
            shown.append(net["norms"][1].running_mean.clone())
    assert torch.equal(*shown)


def test_buffers_may_be_removed() -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 1))
    late = nn.Linear(6, 1)
    opt = st.AdamW(net.parameters(), lr=0.01, probe=False, every=5)
    for step in range(30):
        opt.zero_grad()
        F.mse_loss(net(X[:200]) + late(X[:200]), Y[:200]).backward()
        opt.step()
        opt.hyper_step(lambda: F.mse_loss(net(X[200:]) + late(X[200:]), Y[200:]))
        if step == 15:
            nn.utils.remove_spectral_norm(net[0])
            opt.add_param_group({"params": [*late.parameters(), net[0].weight]})
    assert opt.hparams["lr"] != 0.01


def fine_tuned(known: bool, saved: bool = False) -> Tensor:
    """Outputs at the average of a body that is frozen for ten steps."""

    def make(frozen: bool) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 1)
        body.requires_grad_(not frozen)
        groups = [{"params": body.parameters()}, {"params": head.parameters()}]
        more: dict[str, Any] = {"model": nn.Sequential(body, head)} if known else {}
        return body, head, st.AdamW(groups, lr=0.01, total_steps=80, **more)

    def go(run: Any, first: int, last: int) -> None:
        body, head, opt = run
        for step in range(first, last):
            if step == 10:
                body.requires_grad_(True)
            chosen = torch.randint(200, (16,), generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            F.mse_loss(head(body(X[chosen])), Y[chosen]).backward()
            opt.step()
            opt.hyper_step(lambda: F.mse_loss(head(body(X[200:])), Y[200:]))

    run = make(frozen=True)
    go(run, 0, 40)
    if saved:
        states = copy.deepcopy([part.state_dict() for part in run])
        run = make(frozen=False)
        for part, state in zip(run, states, strict=True):
            part.load_state_dict(state)
    go(run, 40, 60)
    body, head, opt = run
    body.eval()
    with opt.averaged(), torch.no_grad():  # type: ignore[attr-defined]
        return head(body(X[200:]))


def test_unfrozen_layers_have_statistics_of_the_average() -> None:
    found = fine_tuned(known=False)
    assert (found - fine_tuned(known=True)).abs().max() < 0.1  # of outputs up to 4
    assert torch.equal(fine_tuned(known=False, saved=True), found)


@pytest.mark.parametrize("step", [10, 50])  # before and after the choice
def test_a_mixture_resumes_with_layers_frozen_during_its_run(step: int) -> None:
    def make() -> tuple[nn.Sequential, st.Mixture]:
        torch.manual_seed(0)
        return (net := nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))), st.Mixture(
            net, [st.rules.SGD(), st.rules.AdamW()], lr=0.01, total_steps=100
        )

    def go(net: nn.Module, opt: st.Mixture, steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            F.mse_loss(net(X[:200]), Y[:200]).backward()
            opt.step()
            opt.hyper_step(lambda: F.mse_loss(net(X[200:]), Y[200:]))

    net, opt = make()
    go(net, opt, step)
    net[0].requires_grad_(False)
    go(net, opt, 5)
    states = copy.deepcopy([net.state_dict(), opt.state_dict()])
    again, other = make()
    again[0].requires_grad_(False)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for one in ((net, opt), (again, other)):
        go(*one, 10)
    for mine, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Gan:
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.maker = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.nets = (self.maker, self.critic)
        self.opts = [st.Adam(n.parameters(), lr=1e-3, total_steps=80) for n in self.nets]

    def judged(self) -> Tensor:
        made = self.maker(torch.randn(16, 4)).detach()
        return (F.softplus(-self.critic(X[:16, :2])) + F.softplus(self.critic(made))).mean()

    def made(self) -> Tensor:
        return F.softplus(-self.critic(self.maker(torch.randn(16, 4)))).mean()

    def go(self, steps: int) -> None:
        for _ in range(steps):
            for opt, loss in (self.opts[1], self.judged), (self.opts[0], self.made):
                opt.zero_grad()
                loss().backward()
                opt.step()
                opt.hyper_step(loss)

    def parts(self) -> list[Any]:
        return [*self.nets, *self.opts]


@pytest.mark.parametrize("step", [3, 20])  # within the sweep, and after it
def test_a_gan_resumes_with_the_statistics_of_its_average(step: int) -> None:
    run, again = Gan(), Gan()
    run.go(step)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run.parts()], file)
    file.seek(0)
    random = torch.get_rng_state()
    for part, state in zip(again.parts(), torch.load(file), strict=True):
        part.load_state_dict(state)
    shown = []
    for each in (run, again):
        torch.set_rng_state(random)
        each.go(8)
        each.maker.eval()
        with each.opts[0].averaged(), torch.no_grad():
            shown.append(each.maker(torch.ones(3, 4)))
    assert torch.equal(*shown)


def test_weights_that_touch_0_keep_their_average_in_copies_and_new_groups() -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 20)
    y = x @ (torch.rand(20, 1) * (torch.rand(20, 1) > 0.5)) + 0.3 * torch.randn(300, 1)
    net, late = nn.Linear(20, 1), nn.Linear(20, 1)
    opt = st.SGD(net.parameters(), lr=0.05, momentum=0.9, total_steps=400, probe=False)
    for _ in range(150):
        chosen = torch.randint(200, (8,))
        opt.zero_grad()
        F.mse_loss(net(x[chosen]), y[chosen]).backward()
        opt.step()
        with torch.no_grad():
            net.weight.clamp_(min=0)
        opt.hyper_step(lambda: F.mse_loss(net(x[200:]), y[200:]))
    assert bool((net.weight == 0).any())

    def averaged(net: nn.Linear, opt: Any) -> Tensor:
        with opt.averaged():
            return net.weight.detach().clone()

    before = averaged(net, opt)
    assert bool((before > 0).all())
    assert torch.equal(averaged(*copy.deepcopy((net, opt))), before)
    opt.add_param_group({"params": late.parameters()})
    assert torch.equal(averaged(net, opt), before)
