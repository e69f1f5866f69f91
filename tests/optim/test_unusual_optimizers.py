"""Wrapped optimizers that keep state of their own. Truth: the optimizer alone, nothing tuned."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st

FIXED: dict[str, Any] = {"tune": (), "probe": False, "guard": False}


class Warming(torch.optim.Optimizer):
    """SGD whose steps grow with a counter that only its own ``state_dict`` saves."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * min(1.0, self.count / 10) * param.grad)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "count"})


class Keyed(torch.optim.Optimizer):
    """A counter under a key of its own, as that of MADGRAD."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.state["k"] = torch.tensor([0])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["k"] += 1
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] / float(self.state["k"]) ** 0.5 * param.grad)


class Adapting(torch.optim.Optimizer):
    """Raises its rate by itself."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)
            group["lr"] *= 1.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def train(net: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("kind", [Warming, Keyed, Adapting])
def test_steps_are_those_of_the_optimizer(kind: Any) -> None:
    ends = []
    for wrap in (lambda opt: opt, lambda opt: st.SelfTuning(opt, **FIXED)):
        net = network()
        train(net, wrap(kind(net.parameters(), lr=0.1)), 0, 20)
        ends.append(weights(net))
    torch.testing.assert_close(ends[1], ends[0])


@pytest.mark.parametrize("kind", [Warming, Keyed, Adapting])
def test_what_it_saves_is_resumed(kind: Any) -> None:
    """Truth: the run that was not interrupted, bit for bit."""
    net = network()
    opt = st.SelfTuning(kind(net.parameters(), lr=0.1), **FIXED)
    train(net, opt, 0, 5)
    state = copy.deepcopy((net.state_dict(), opt.state_dict()))
    train(net, opt, 5, 15)
    again = network()
    other = st.SelfTuning(kind(again.parameters(), lr=0.1), **FIXED)
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    train(again, other, 5, 15)
    assert torch.equal(weights(again), weights(net))


def test_hooks_of_the_wrapped_optimizer_run() -> None:
    """Truth: what the hook allows."""
    net = network()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    calls = []
    inner.register_step_pre_hook(lambda *_: calls.append("before"))

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            for param in net.parameters():
                param.clamp_(-0.05, 0.05)

    inner.register_step_post_hook(clamp)
    train(net, st.SelfTuning(inner, probe=False), 0, 3)
    assert calls == ["before"] * 3
    assert float(weights(net).abs().max()) <= 0.05


class Around(torch.optim.Optimizer):
    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner


def test_an_optimizer_around_another_is_refused() -> None:
    """Its inner one would step at the rates that were given, in silence."""
    inner = Around(torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"Around wraps another optimizer.*Around\(st.AdamW"):
        st.SelfTuning(inner)


def test_counts_in_groups_begin_anew_with_the_moments() -> None:
    """Truth: the size of Adam's first step after a rewind is its rate."""

    class Grouped(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for param in group["params"]:
                    entry = self.state[param]
                    if not entry:
                        entry.update(m=torch.zeros_like(param), v=torch.zeros_like(param))
                    entry["m"].lerp_(param.grad, 0.1)
                    entry["v"].lerp_(param.grad.square(), 0.001)
                    m = entry["m"] / (1 - 0.9 ** group["step"])
                    v = entry["v"] / (1 - 0.999 ** group["step"])
                    param.sub_(group["lr"] * m / (v.sqrt() + 1e-12))

    net = network()
    opt = st.SelfTuning(Grouped(net.parameters(), lr=1e-3), total_steps=200)
    for step in range(40):
        swept = opt.sweeping
        train(net, opt, step, step + 1)
        opt.hyper_step(lambda: net(torch.ones(4, 3).double()).square().mean())
        if swept and not opt.sweeping:
            break
    before = weights(net)
    train(net, opt, 50, 51)
    size = (weights(net) - before).abs().mean() / opt.param_groups[0]["applied_lr"]
    assert float(size) == pytest.approx(1, abs=0.1)


def test_the_peak_of_one_cycle_is_its_highest_rate() -> None:
    """Torch writes a 25th of it as the initial rate."""
    net = network()
    opt = st.SGD(net.parameters(), lr=0.1, momentum=0.9, tune=("weight_decay",), probe=False)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=20, cycle_momentum=False)
    for step in range(10):
        train(net, opt, step, step + 1)
        plan.step()
    assert opt.hparams["lr"] == opt.param_groups[0]["peak_lr"] == 0.2


@pytest.mark.parametrize("make", [st.SGD, st.AdamW])
def test_rates_of_a_scheduler_are_not_the_peak(make: Any) -> None:
    """Truth: the rate that was given; at the end of a cosine, the present one is 0."""
    net = network()
    opt = make(net.parameters(), lr=0.1, tune=("weight_decay",), total_steps=20,
               schedule="constant", probe=False)  # fmt: skip
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    for step in range(20):
        train(net, opt, step, step + 1)
        plan.step()
    assert opt.hparams["lr"] == 0.1
    assert opt.param_groups[0]["peak_lr"] == 0.1
    assert opt.param_groups[0]["applied_lr"] < 0.01
