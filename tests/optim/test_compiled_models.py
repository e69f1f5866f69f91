"""``torch.compile(model)`` beside an optimizer. Truth: no warning, and the run without it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st


def run(compiled: bool, given: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    model = torch.compile(net, backend="eager") if compiled else net
    params = {"module": net, "compiled": model, "parameters": net.parameters()}[given]
    opt = st.SGD(params, lr=0.01, probe=False, every=5)
    x = torch.randn(32, 4)
    for _ in range(20):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        opt.hyper_step(lambda: (model(x) - 1).square().mean())
    with opt.averaged():
        return [t.clone() for t in net.state_dict().values()]


@pytest.mark.parametrize("given", ["module", "compiled", "parameters"])
def test_a_compiled_model_gives_no_warning(given: str) -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = run(True, given)
    assert not [w for w in told if "global hooks" in str(w.message)]
    for one, other in zip(found, run(False, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    "no": lambda net: loss_of(net),
    "model": lambda net: loss_of(torch.compile(net, backend="eager", fullgraph=True)),
    "in place": lambda net: loss_of(net.compile(backend="eager", fullgraph=True) or net),
    "loss": lambda net: torch.compile(loss_of(net), backend="eager"),
}


def loss_of(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (model(x) - 1).square().mean()


def averaged(how: str, *, resumed: bool) -> list[Tensor]:
    """The averaged model of a run, the second half of which may be resumed and compiled."""

    def begin() -> tuple[nn.Module, st.SGD]:
        torch.manual_seed(0)
        net = Network()
        return net, st.SGD(net.parameters(), lr=0.01, probe=False, every=5)

    torch._dynamo.reset()
    x = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(1))
    net, opt = begin()
    loss = COMPILED["no" if resumed else how](net)
    for step in range(20):
        if resumed and step == 10:
            saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
            net, opt = begin()
            net.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
            loss = COMPILED[how](net)
        opt.zero_grad()
        loss(x[0]).backward()
        opt.step()
        opt.hyper_step(lambda loss=loss: loss(x[1] + 3))
    with opt.averaged():
        return [t.clone() for t in net.state_dict().values()]


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.")  # a loaded run's first pass
@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("how", ["model", "in place", "loss"])
def test_layers_of_compiled_graphs_are_found(how: str, resumed: bool) -> None:
    """Whole graphs, and compiled loss functions. Truth: the uninterrupted run without them."""
    pairs = zip(averaged(how, resumed=resumed), averaged("no", resumed=False), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
