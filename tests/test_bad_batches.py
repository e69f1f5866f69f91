"""A batch with NaN: its step is skipped. Truth: the same run without that batch."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

STEPS = 200
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(STEPS, 32, 5, generator=DRAW)
Y = (X.sum(2) + 0.5 * torch.randn(STEPS, 32, generator=DRAW) > 0).long()
VAL = X[-1], Y[-1]


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), *layers, nn.ReLU(), nn.Linear(16, 2))


def batches(bad: int | range | None) -> list[tuple[Tensor, Tensor]]:
    """Batches, and one of NaN before the given one, or in place of those of a range."""
    found, nan = list(zip(X, Y, strict=True)), (X[0] * torch.nan, Y[0])
    if isinstance(bad, int):
        found.insert(bad, nan)
    for at in bad if isinstance(bad, range) else ():
        found[at] = nan
    return found


def loop(net: nn.Module, bad: int | range | None, **options: Any) -> st.AdamW:
    """Train by a drop-in optimizer."""
    opt = st.AdamW(net, lr=1e-3, total_steps=STEPS, **options)
    for x, y in batches(bad):
        opt.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: cross_entropy(net(VAL[0]), VAL[1]))
    return opt


def fit(net: nn.Module, bad: int | range | None) -> None:
    """Train by a tuner."""
    tuner = st.Tuner(net, cross_entropy, hparams={"lr": 1e-3}, compile=False)
    tuner.fit(batches(bad), [VAL], epochs=1, progress=False)


def chosen(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = re.findall(r"learning rate times \S+", caplog.text)
    caplog.clear()
    return found


@pytest.mark.parametrize("train", [loop, fit])
def test_the_sweep_selects_the_rate_of_a_run_without_the_bad_batch(
    train: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "selftune")
    train(network(), None)
    clean = chosen(caplog)
    assert len(clean) == 1
    for bad in (1, 3, 7):
        train(network(), bad)
        assert "not finite; the step is skipped" in caplog.text
        assert chosen(caplog) == clean, bad


def test_a_bad_first_batch_cannot_be_due_to_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "selftune")
    loop(network(), None)
    clean = chosen(caplog)
    loop(network(), 0)
    assert chosen(caplog) == clean


def test_a_sweep_that_diverges_still_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Law: at rates far above, gradients are not finite on every batch."""
    caplog.set_level(logging.INFO, "selftune")
    net = network()
    opt = st.SGD(net, lr=1e30, total_steps=STEPS, bounds={"lr": (1e-8, 1e38)})
    for x, y in batches(None):
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
    assert len(chosen(caplog)) == 1
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("bad", [0, 3, 100])
def test_statistics_of_batchnorm_stay_finite(bad: int) -> None:
    net = network(nn.BatchNorm1d(16))
    opt = loop(net, bad)
    net.eval()
    with torch.no_grad():
        assert float(cross_entropy(net(VAL[0]), VAL[1])) < 0.6
        with opt.averaged():
            assert float(cross_entropy(net(VAL[0]), VAL[1])) < 0.6


@pytest.mark.parametrize("train", [loop, fit])
def test_batches_of_nan_to_the_end_are_skipped_with_one_more_warning(
    train: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Law: one rewind, because the learning rate may be the cause; no more where it cannot be."""
    net = network()
    with caplog.at_level(logging.INFO, "selftune"):
        train(net, range(120, STEPS))
    assert len(re.findall("learning rate divided by 3", caplog.text)) == 1
    assert len(re.findall("are not finite either", caplog.text)) == 1
    assert all(p.isfinite().all() for p in net.parameters())
