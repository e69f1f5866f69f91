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


@pytest.mark.parametrize("train", [loop, fit])
def test_a_skipped_step_after_the_sweep_is_named_once(
    train: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It would come back in every epoch."""
    train(network(), None)
    assert "not finite" not in caplog.text
    for bad in (range(100, 101), range(100, 200, 20)):
        caplog.clear()
        train(network(), bad)
        assert caplog.text.count("not finite; the step is skipped, as are later ones") == 1


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over known targets whose gradient is NaN wherever one is missing: 0 · NaN."""
    missing = targets.isnan()
    return torch.where(missing, 0.0, (outputs - targets) ** 2).sum() / (~missing).sum()


@pytest.mark.parametrize("face", ["optimizer", "tuner"])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_hypergradients_of_a_run_without_finite_gradients_do_not_lower_the_rate(
    face: str, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: no step was taken since the rewind, so neither rate nor weights are the cause."""
    caplog.set_level(logging.INFO, "selftune")
    net, x = nn.Linear(5, 1), torch.randn(32, 5)
    y = x.sum(1, keepdim=True)
    y[::8] = torch.nan
    if face == "optimizer":
        opt = getattr(st, rule)(net, lr=0.01, total_steps=STEPS, probe=False)
        for _ in range(STEPS):
            opt.zero_grad()
            masked(net(x), y).backward()
            opt.step()
            opt.hyper_step(lambda: masked(net(x), y))
        last = opt.hparams["lr"]
    else:
        own = getattr(st.rules, rule)()
        tuner = st.Tuner(net, masked, rule=own, hparams={"lr": 0.01}, probe=False)
        last = tuner.fit([(x, y)] * STEPS, [(x, y)], epochs=1, progress=False).hparams["lr"]
    assert len(re.findall("back to the last good weights", caplog.text)) == 1
    assert last == pytest.approx(0.01 / 3)
