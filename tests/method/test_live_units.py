"""Live units. Truths: counts by hand; layers that are frozen or unused are not dead."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.method import live_units


def test_units_of_each_layer() -> None:
    """By hand: rows with a gradient, of matrices if there are any; an empty shard has none."""
    conv = torch.zeros(3, 2, 2)
    conv[1, 0, 1] = 1e-30
    grads = [conv, torch.ones(3), torch.ones(4, 2), torch.ones(0, 2)]
    assert live_units(grads).tolist() == [1.0, 4.0, 0.0]
    assert live_units([torch.tensor([0.0, 1.0]), torch.tensor(2.0)]).tolist() == [1.0, 1.0]
    some = live_units(grads, [True, False, False, True])
    assert some[[0, 2]].tolist() == [1.0, 0.0]
    assert some[1].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["freeze", "tasks"])
def test_frozen_and_unused_layers_are_not_dead(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Law: a layer without gradients at a raised rate is no reason to return to old weights."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    narrow, wide = nn.Linear(64, 5), nn.Linear(64, 200)
    x = torch.randn(2000, 20)
    first, second = x[:, :5].sin(), (x @ torch.randn(20, 200)).tanh()
    model = nn.ModuleList([body, narrow, wide])
    opt = st.AdamW(model, lr=1e-3, total_steps=400)

    def loss(step: int, rows: Tensor) -> Tensor:
        hidden = body(x[rows])
        one = F.mse_loss(narrow(hidden), first[rows])
        if kind == "tasks" and (step // 60) % 2:
            return one
        two = F.mse_loss(wide(hidden), second[rows])
        return two if kind == "tasks" else one + two

    with caplog.at_level(logging.INFO, logger="selftune"):
        for step in range(400):
            if kind == "freeze" and step == 200:
                body.requires_grad_(False)
            opt.zero_grad()
            loss(step, torch.randint(1500, (64,))).backward()
            opt.step()
            opt.hyper_step(partial(loss, step, torch.randint(1500, 2000, (64,))))
    assert opt.hparams["lr"] > 2e-3, "the rate has risen"
    assert "units died" not in caplog.text
