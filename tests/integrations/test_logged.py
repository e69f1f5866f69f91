"""What loggers of frameworks are given. Truth: the schedule by hand."""

import pytest
import torch
from torch import nn

import selftune as st
from selftune.integrations._logged import logged


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_the_applied_rate_is_logged_beside_the_peak(ratio: float) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = [
        {"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.01 * ratio}
    ]  # fmt: skip
    opt = st.SGD(groups, lr=0.01, total_steps=10, probe=False)
    for _ in range(4):
        opt.zero_grad()
        net(torch.ones(4, 2)).square().mean().backward()
        opt.step()
    found = logged(opt, torch.tensor(2.0))
    applied = 0.01 * (1 - 3 / 10)
    if ratio == 1:
        assert found["hyper/lr"] == pytest.approx(0.01)
        assert found["lr"] == pytest.approx(applied)
    else:
        assert found["hyper/lr/1"] == pytest.approx(0.001)
        assert [found["lr/0"], found["lr/1"]] == pytest.approx([applied, applied * ratio])
    assert found["hyper/loss"] == 2
