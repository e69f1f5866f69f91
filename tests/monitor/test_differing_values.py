"""Logs of runs in which groups or tensors have hyperparameters of their own."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune.monitor import InMemory

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(256, 4, generator=GENERATOR)
Y = X.square().sum(1, keepdim=True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
    )


def groups(model: nn.Sequential, **last: float) -> list[dict[str, Any]]:
    """The last layer has options of its own."""
    params = [model[i].parameters() for i in (0, 2, 4)]
    return [{"params": params[0]}, {"params": params[1]}, {"params": params[2], **last}]


def train(model: nn.Module, opt: Any, steps: int) -> list[tuple[int, dict[str, Any]]]:
    """Values after each hyperparameter step."""
    seen = []
    for i in range(steps):
        opt.zero_grad()
        F.mse_loss(model(X[:64]), Y[:64]).backward()
        opt.step()
        if opt.hyper_step(lambda: F.mse_loss(model(X[128:]), Y[128:])) is not None:
            seen.append((i + 1, opt.hparams))
    return seen


def test_an_index_is_the_same_group_all_along() -> None:
    """Truth: ``opt.hparams``; the floor makes the weight decays of three groups equal."""
    log, model = InMemory(), net()
    given = groups(model, weight_decay=0.3)
    opt = st.AdamW(given, lr=1e-3, total_steps=300, per="group", log_dir=log)
    seen = train(model, opt, 300)
    opt.finish()
    decays = [v["weight_decay"] for _, v in seen]
    assert any(isinstance(v, list) for v in decays)
    assert not isinstance(decays[-1], list)
    for group in range(3):
        steps, values = log.curve(f"hyper/weight_decay/{group}")
        expected = [v[group] if isinstance(v, list) else v for v in decays]
        assert steps[: len(seen)] == [s for s, _ in seen]
        assert values[: len(seen)] == pytest.approx(expected)


@pytest.mark.parametrize("per", ["run", "group", "tensor"])
def test_a_group_may_join_a_logged_run(per: str) -> None:
    """Twin: the same run without a log."""
    ends = []
    for log in (None, InMemory()):
        model = net()
        opt = st.AdamW(model[2:].parameters(), lr=1e-3, per=per, log_dir=log)
        train(model, opt, 60)
        opt.add_param_group({"params": model[0].parameters()})
        train(model, opt, 60)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert log is not None
    assert log.curve("hyper/lr")[0][-1] > 100
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_explanation_names_values_of_the_middle_group_throughout() -> None:
    """Law: the sweep multiplies the rates of all groups by one factor."""
    model = net()
    opt = st.AdamW(groups(model, lr=0.1), lr=1e-3, total_steps=200)
    train(model, opt, 13)
    assert not opt.sweeping
    factor = opt.hparams["lr"][0] / 1e-3
    assert factor > 1.5
    assert f"lr: given 0.001 → sweep {1e-3 * factor:.3g}" in opt.explain()


def test_explanations_need_no_log() -> None:
    """Twin: the same run with one."""
    whys = []
    for log in (None, InMemory()):
        model = net()
        opt = st.AdamW(model.parameters(), lr=1e-3, total_steps=150, log_dir=log)
        train(model, opt, 150)
        whys.append(opt.explain())
    assert whys[0] == whys[1]
    assert "its floor" in whys[0]


def test_one_loss_of_nan_does_not_end_the_predictions() -> None:
    """Law: the running mean is that of the other losses."""
    log, model = InMemory(), net()
    opt = st.AdamW(model.parameters(), lr=1e-3, total_steps=200, log_dir=log)
    train(model, opt, 100)
    spoiled = itertools.chain([math.nan], itertools.repeat(0.0))
    for _ in range(80):
        opt.zero_grad()
        F.mse_loss(model(X[:64]), Y[:64]).backward()
        opt.step()
        opt.hyper_step(lambda: F.mse_loss(model(X[128:]), Y[128:]) + next(spoiled))
    steps, values = log.curve("response/realised")
    assert steps[-1] > 140
    assert all(map(math.isfinite, values[-5:]))
    assert sum(map(math.isnan, log.curve("Loss/val")[1])) == 1
