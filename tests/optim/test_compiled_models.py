"""``torch.compile(model)`` beside an optimizer. Truth: no warning, and the run without it."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

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
