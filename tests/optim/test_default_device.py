"""A default device other than the model's. Truth: the same run without one, bit for bit.

The device is "meta", whose tensors have no values: each one made there by accident is an error.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st

X = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def in_loop(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    def run(net: nn.Module) -> None:
        opt = make(net)
        for _ in range(120):
            opt.zero_grad()
            F.mse_loss(net(X[:70]), Y[:70]).backward()
            opt.step()
            opt.hyper_step(lambda: F.mse_loss(net(X[70:]), Y[70:]))
        opt.report(0.5)
        opt.load_state_dict(opt.state_dict())
        opt.eval()

    return run


def by_tuner(**options: Any) -> Callable[[nn.Module], Any]:
    def run(net: nn.Module) -> None:
        tuner = st.Tuner(net, F.mse_loss, compile=False, **options)
        tuner.fit([(X[:70], Y[:70])] * 5, [(X[70:], Y[70:])], steps=100, progress=False)

    return run


RUNS = {
    "AdamW": in_loop(lambda net: st.AdamW(net, total_steps=120)),
    "AdamW without a length": in_loop(lambda net: st.AdamW(net)),
    "AdamW per tensor": in_loop(lambda net: st.AdamW(net, per="tensor")),
    "SGD per group": in_loop(
        lambda net: st.SGD([{"params": [p]} for p in net.parameters()], lr=0.01, per="group")
    ),
    "Lion": in_loop(lambda net: st.Lion(net, total_steps=120)),
    "Muon": in_loop(lambda net: st.Muon(net, total_steps=120)),
    "Mixture": in_loop(
        lambda net: st.Mixture(net, rules=[st.rules.SGD(), st.rules.AdamW()], total_steps=120)
    ),
    "SelfTuning": in_loop(
        lambda net: st.SelfTuning(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
    ),
    "Tuner": by_tuner(),
    "a population": by_tuner(population=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_tensor_is_made_on_a_default_device(name: str) -> None:
    ends = []
    for device in (None, "meta"):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
        )  # fmt: skip
        torch.set_default_device(device)
        try:
            RUNS[name](net)
        finally:
            torch.set_default_device(None)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
