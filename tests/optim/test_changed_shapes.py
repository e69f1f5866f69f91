"""Parameters whose ``.data`` gets another shape or dtype. Truth: a new optimizer over them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: st.SGD(net.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda net: st.AdamW(net, lr=0.01),
    "AdamW, not tuned": lambda net: st.AdamW(net, lr=0.01, tune=(), guard=False),
    "NAdam": lambda net: st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=0.01)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def loss_of(net: nn.Module) -> Tensor:
    return net(X.to(net[0].weight.dtype)).square().mean()


def train(net: nn.Module, opt: Any, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(net).backward()
        opt.step()
        opt.hyper_step(lambda: loss_of(net))


def widened(net: nn.Module) -> None:
    net[0].weight.data, net[0].bias.data = torch.randn(9, 4), torch.zeros(9)
    net[2].weight.data = torch.randn(1, 9)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("change", [widened, nn.Module.double])
def test_a_change_during_the_run_is_refused(make: str, change: Callable[[Any], None]) -> None:
    """A kernel of torch would write beyond the state of the previous shape."""
    net = network()
    opt = MAKES[make](net)
    train(net, opt, 5)
    change(net)
    opt.zero_grad()
    loss_of(net).backward()
    with pytest.raises(ValueError, match=r"\(6, 4\), torch.float32.* new optimizer") as error:
        opt.step()
    assert ("0.weight" if make.startswith("AdamW") else "param_groups[0][0]") in str(error.value)


@pytest.mark.parametrize("make", MAKES)
def test_another_shape_with_as_many_values_is_refused(make: str) -> None:
    """Truth: an error with both shapes (it was torch's own, from inside the step)."""
    net = nn.Linear(2, 6)
    opt = MAKES[make](net)
    for _ in range(3):
        opt.zero_grad()
        net(X[:, :2]).square().mean().backward()
        opt.step()
    net.weight.data = torch.randn(4, 3)
    opt.zero_grad()
    net.weight.square().mean().backward()
    with pytest.raises(ValueError, match=r"from \(\(6, 2\), torch.float32\) to \(\(4, 3\)"):
        opt.step()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("look", ["memory", "averaged", "state_dict"])
@pytest.mark.parametrize("change", [widened, nn.Module.double])
def test_a_change_before_the_first_step_is_followed(
    make: str, look: str, change: Callable[[Any], None]
) -> None:
    nets = network(), network()
    opt = MAKES[make](nets[0])
    if look == "averaged":
        with opt.averaged():
            pass
    else:
        getattr(opt, look)()
    for net in nets:
        torch.manual_seed(1)
        change(net)
    train(nets[0], opt, 40)
    train(nets[1], MAKES[make](nets[1]), 40)
    for ours, expected in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(ours, expected)
