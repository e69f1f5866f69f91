"""A rule that only has a direction. Truth: the same rule with closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune import rules

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = list(zip(X.split(8), X.sum(1, keepdim=True).sin().split(8), strict=True))


class Own(rules.SGD):
    tangent = rules.AbstractRule.tangent


@pytest.mark.parametrize("closed", [True, False])
def test_it_tunes_alike(closed: bool) -> None:
    ends = []
    for rule in (rules.SGD(), Own()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        tuner = st.Tuner(
            net, F.mse_loss, rule=rule, hparams={"lr": 0.01, "momentum": 0.5, "weight_decay": 1e-4},
            estimator=st.Trace(closed_forms=closed), probe=False, compile=False,
        )  # fmt: skip
        ends.append(tuner.fit(BATCHES[:6], BATCHES[6:], steps=40, progress=False).hparams)
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)
    assert ends[0]["lr"] != 0.01
