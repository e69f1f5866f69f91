"""Steps taken in place by torch's kernels, which nobody tracks. Truth: torch's own optimizer."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import selftune as st
from selftune.optim._block import Block  # private: steps in place look like any others

STEPS = 30
CASES = [
    (st.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), True),
    (st.SGD, dict(lr=0.05, momentum=0.9, nesterov=True), True),
    (st.SGD, dict(lr=0.05, momentum=0.8, dampening=0.5), False),
    (st.SGD, dict(lr=0.05), True),
    (st.Adam, dict(lr=0.01, weight_decay=0.1), True),
    (st.Adam, dict(lr=0.01, amsgrad=True, betas=(0.8, 0.9)), True),
    (st.AdamW, dict(lr=0.01, weight_decay=0.3), True),
    (st.AdamW, dict(lr=0.01, maximize=True), True),
    (st.RMSprop, dict(lr=0.01), False),
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step in place."""
    taken: list[int] = []
    step = Block.step_in_place
    monkeypatch.setattr(Block, "step_in_place", lambda *a: (taken.append(1), step(*a))[1])
    return taken


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()


def loss_of(net: nn.Module) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    x, y = (torch.randn(s, generator=noise).double() for s in ((16, 2, 3, 3), (16, 2)))
    return mse_loss(net(x), y)


def train(net: nn.Module, opt: torch.optim.Optimizer, change=lambda step: None) -> Tensor:
    for step in range(STEPS):
        opt.zero_grad()
        (loss_of(net) if not opt.defaults.get("maximize") else -loss_of(net)).backward()
        change(step)
        opt.step()
        if isinstance(opt, st.optim.SelfTuningOptimizer):
            opt.hyper_step(lambda: loss_of(net))
    return torch.cat([p.detach().ravel() for p in net.parameters()])


def both(shell: type, options: dict, prepare=lambda net: net, change=None) -> tuple[Tensor, Tensor]:
    """The weights after our steps and after those of torch."""
    ends = []
    for kind in (shell, getattr(torch.optim, shell.__name__)):
        net = prepare(network())
        ours = dict(tune=(), probe=False) if kind is shell else {}
        opt = kind(net.parameters(), **options, **ours)
        ends.append(train(net, opt, *([] if change is None else [change(net)])))
    return ends[0], ends[1]


@pytest.mark.parametrize(("shell", "options", "fused"), CASES)
def test_equals_torch(shell: type, options: dict, fused: bool, counted: list[int]) -> None:
    ours, theirs = both(shell, options)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert (len(counted) > STEPS // 2) == fused


def test_weights_in_another_memory_order(counted: list[int]) -> None:
    """Kernels pair weights and state by their place in memory, so such weights go without."""

    def reorder(net: nn.Module) -> nn.Module:
        net = net.to(memory_format=torch.channels_last)
        assert not net[0].weight.is_contiguous()
        return net

    ours, theirs = both(st.AdamW, dict(lr=0.01), reorder)
    assert not counted
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_weights_without_a_gradient_now_and_then() -> None:
    def change(net: nn.Module):
        def drop(step: int) -> None:
            if step % 3 == 0:
                net[0].bias.grad = None

        return drop

    ours, theirs = both(st.AdamW, dict(lr=0.01), change=change)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("step", [13, 14, 15, 16, 20])
def test_a_gradient_that_is_not_finite_is_skipped(step: int) -> None:
    """The run with the bad gradient ends where one ends that never saw the step."""
    ends = []
    for bad in (True, False):
        net = network()
        opt = st.AdamW(net, lr=0.01, tune=(), probe=False)
        for now in range(STEPS):
            opt.zero_grad()
            loss_of(net).backward()
            if now == step:
                if not bad:
                    continue
                net[0].weight.grad[0, 0] = torch.nan
            opt.step()
            opt.hyper_step(lambda n=net: loss_of(n))
        ends.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-13)
