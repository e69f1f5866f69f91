"""The probe's choice on trial. Truth: gradient descent on ½ w², which diverges above 2."""

import pytest
import torch
from torch import nn

import selftune as st
from selftune.probe import Probe


def descend(lr: float, steps: int, lowest: float) -> tuple[nn.Parameter, st.optim.SelfTuned]:
    """Steps after a probe that found a descent of ``-lowest``."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = st.SGD([weight], lr=lr, tune=("lr",), probe=10)
    opt._engine.probe = Probe(steps=10, ended=True, lowest=lowest)
    for _ in range(steps):
        weight.grad = weight.detach().clone()
        opt.step()
    return weight, opt


def test_a_rate_that_leads_uphill_is_lowered_from_where_it_began() -> None:
    """Closed form: from ½·2 the first step at 2.5 adds 1.25, of which it may lose 1."""
    weight, opt = descend(2.5, 2, lowest=-2.0)
    assert opt.hparams["lr"] == pytest.approx(2.5 / 3)
    assert torch.equal(weight.detach(), torch.ones(2, dtype=torch.float64))
    weight, opt = descend(2.5, 20, lowest=-2.0)
    assert opt.hparams["lr"] == pytest.approx(2.5 / 3)
    assert float(weight.detach().abs().max()) < 1e-6


def test_a_rate_that_descends_is_kept() -> None:
    """Also where it oscillates: 1.9 is below 2."""
    _, opt = descend(1.9, 20, lowest=-2.0)
    assert opt.hparams["lr"] == pytest.approx(1.9)


def test_little_to_lose_is_no_reason() -> None:
    """Law: where the probe found a descent of 3, adding 1.25 once is less than half."""
    _, opt = descend(2.5, 2, lowest=-3.0)
    assert opt.hparams["lr"] == pytest.approx(2.5)
