"""Low precision. Truths: the float32 run, and the dtypes themselves."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import selftune as st

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
LOW = [torch.bfloat16, torch.float16]
SHELLS = [st.SGD, st.Adam, st.AdamW, st.RMSprop, st.Lion]


def network(*dtypes: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    first, last = dtypes[0], dtypes[-1]
    return nn.ModuleList([nn.Linear(4, 16, dtype=first), nn.Linear(16, 2, dtype=last)])


def loss_of(net: nn.Module) -> Tensor:
    hidden = net[0](X.to(net[0].weight.dtype)).tanh()
    logits = net[1](hidden.to(net[1].weight.dtype))
    return nn.functional.cross_entropy(logits.float(), Y)


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int = 100) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(net).backward()
        opt.step()
        opt.hyper_step(lambda: loss_of(net))


@cache
def end_in_float32(shell: type) -> float:
    net = network(torch.float32)
    opt = shell(net.parameters())
    train(net, opt)
    with opt.averaged():
        return float(loss_of(net).detach())


@pytest.mark.parametrize("dtypes", [(t,) for t in LOW] + [(t, torch.float32) for t in LOW])
@pytest.mark.parametrize("shell", SHELLS)
def test_trains_and_tunes(shell: type, dtypes: tuple[torch.dtype, ...]) -> None:
    net = network(*dtypes)
    opt = shell(net.parameters())
    start = float(loss_of(net).detach())
    train(net, opt)
    assert [p.dtype for m in net for p in m.parameters()] == [
        t for t in (dtypes[0], dtypes[-1]) for _ in range(2)
    ]
    with opt.averaged():  # single iterates of RMSprop swing
        end = float(loss_of(net).detach())
    assert end < 0.5 * start
    assert (
        end < end_in_float32(shell) + 0.15
    )  # loose: the sweep's choice and the rounding of weights differ


@pytest.mark.parametrize("dtype", LOW)
def test_one_step_equals_float32_rounded_once(dtype: torch.dtype) -> None:
    """By hand: all arithmetic in float32, the result rounded."""
    weight = nn.Parameter(torch.randn(50).to(dtype))
    before = weight.detach().float()
    grad = torch.randn(50).to(dtype)
    opt = st.SGD([weight], lr=0.1, weight_decay=0.2, tune=(), probe=False)
    weight.grad = grad
    opt.step()
    want = before - 0.1 * (grad.float() + 0.2 * before)
    torch.testing.assert_close(weight.detach(), want.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", LOW)
def test_state_is_float32(dtype: torch.dtype) -> None:
    net = network(dtype)
    opt = st.Adam(net.parameters(), probe=False)
    train(net, opt, 10)
    for entry in opt.state.values():
        tensors = {k: v for k, v in entry.items() if isinstance(v, Tensor)}
        assert {"average", "tangent/0", "sensitivity/0", "exp_avg"} <= set(tensors)
        assert all(v.dtype == torch.float32 for v in tensors.values())


def test_tangents_gather_what_bfloat16_would_lose() -> None:
    """By hand: with gradient 1 each step, the lr tangent is -lr times a geometric sum."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    estimator = st.Trace(discount=1.0, closed_forms=False)
    opt = st.SGD([weight], lr=0.01, tune=("lr",), probe=False, estimator=estimator)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        opt.step()
    tangent = opt.state[weight]["tangent/0"]
    torch.testing.assert_close(tangent, torch.full((3,), -0.4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("other", [torch.float32, *LOW])
def test_float64_beside_others_is_refused(other: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"params.*float64.*one dtype"):
        st.SGD(network(other, torch.float64).parameters())
