"""How hyperparameters came to their values. Truths: lines by hand, the run's own record."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.monitor import Course, InMemory, Verdict

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def loss_of(net: nn.Module, part: slice) -> Tensor:
    return F.mse_loss(net(X[part]), X[part, :3].abs())


def test_lines_by_hand() -> None:
    course = Course(
        given={"lr": 1e-3, "beta1": 0.9, "weight_decay": 0.01}, swept={"lr": 0.0057},
        rewinds=[(1240, 0.5, "the validation loss has worsened, to 0.3")], annealed="linear",
    )  # fmt: skip
    verdicts = {
        "lr": Verdict("lr", "settled", "", snr=0.81),
        "weight_decay": Verdict("weight_decay", "at bound", "", floored=True),
    }
    values = {"lr": 0.0236, "beta1": 0.9, "weight_decay": 0.05}
    assert course.explain(values, verdicts).splitlines() == [
        "lr: given 0.001 → sweep 0.0057 → divided by 2 at step 1,240 (the validation loss has "
        "worsened, to 0.3) → 0.0236 by hypergradients (signal-to-noise 0.8) → annealed by a linear "
        "schedule",
        "beta1: given 0.9 → unchanged",
        "weight_decay: given 0.01 → 0.05, its floor",
    ]


@pytest.mark.parametrize("driver", ["optimizer", "tuner"])
def test_values_that_start_elsewhere_than_given_are_not_ascribed_to_hypergradients(
    driver: str,
) -> None:
    """Law: no hyperparameter step was taken; 100 is the highest rate of tuning."""
    net, options = network(), dict(probe=False, guard=False, every=10)
    if driver == "optimizer":
        opt = st.SGD(net.parameters(), lr=1e3, total_steps=20, **options)
        for _ in range(3):
            opt.zero_grad()
            (1e-6 * loss_of(net, slice(64))).backward()
            opt.step()
            opt.hyper_step(lambda: loss_of(net, slice(64, 128)))
        why = opt.explain()
    else:
        made = st.Tuner(
            net, lambda o, t: 1e-6 * F.mse_loss(o, t), rule=st.rules.SGD(), hparams={"lr": 1e3},
            **options,
        )  # fmt: skip
        batch = (X[:64], X[:64, :3].abs())
        why = made.fit([batch], [batch], steps=3, progress=False).why
    assert "lr: given 1e+03 → starts at 100" in why
    assert "momentum: given 0 → starts at 0.1" in why
    assert "by hypergradients" not in why


@pytest.mark.parametrize("driver", ["optimizer", "tuner"])
def test_a_floor_left_later_is_named_with_the_value_that_it_set(
    driver: str, tmp_path: Path
) -> None:
    """Closed form: 0.1 at a low rate; as the floor is 0.3 / Ση, a higher rate lowers it."""
    log, net = InMemory(), network()
    options = dict(probe=False, bounds={"lr": (1e-3, 1e-1)})
    if driver == "optimizer":
        opt = st.AdamW(net.parameters(), lr=1e-3, total_steps=400, log_dir=log, **options)
        for step in range(400):
            opt.zero_grad()
            loss_of(net, slice(32 * (step % 6), 32 * (step % 6) + 32)).backward()
            opt.step()
            opt.hyper_step(lambda: loss_of(net, slice(192, 256)))
        why, end = opt.explain(), opt.hparams["weight_decay"]
    else:
        given = {"lr": 1e-3, "weight_decay": 1e-2}
        batches = [(x, x[:, :3].abs()) for x in X[:192].split(32)]
        tuner = st.Tuner(net, F.mse_loss, hparams=given, compile=False, **options)
        val = [(X[192:], X[192:, :3].abs())]
        result = tuner.fit(batches, val, steps=400, log_dir=tmp_path, progress=False)
        why, end = result.why, result.hparams["weight_decay"]
    line = next(line for line in why.splitlines() if line.startswith("weight_decay"))
    assert end < 0.09
    assert line.startswith("weight_decay: given 0.01 → 0.1, its floor → ")


def test_of_an_optimizer_whose_rate_blows_up_once(caplog: pytest.LogCaptureFixture) -> None:
    net, log = network(), InMemory()
    opt = st.AdamW(net.parameters(), lr=1e-5, total_steps=300, log_dir=log)
    for step in range(300):
        if step == 200:
            with torch.no_grad():
                [p.mul_(100.0) for p in net.parameters()]
        opt.zero_grad()
        loss = loss_of(net, slice(32 * (step % 6), 32 * (step % 6) + 32))
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: loss_of(net, slice(192, 256)))
    lines = dict(line.split(": ", 1) for line in opt.explain().splitlines())
    assert set(lines) == {"lr", "beta1", "weight_decay"}
    assert lines["lr"].startswith("given 1e-05 → sweep ")
    assert lines["lr"].endswith("annealed by a linear schedule")
    warned = [r.getMessage() for r in caplog.records if "last good weights" in r.getMessage()]
    assert ("divided by" in lines["lr"]) == bool(warned)
    assert warned
    assert f"{opt.hparams['lr']:.3g} by hypergradients" in lines["lr"]
    other = st.AdamW(net.parameters(), lr=1e-5, total_steps=300)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.explain().splitlines()[0].startswith(f"lr: {lines['lr'].split(' (signal')[0]}")
    opt.finish()
    (why,) = (text for tag, text, _ in log.texts if tag == "why")
    assert f"- lr: {lines['lr']}" in why


def test_of_a_tuner(caplog: pytest.LogCaptureFixture) -> None:
    batches = [(x, x[:, :3].abs()) for x in X.split(16)]
    tuner = st.Tuner(network(), F.mse_loss, hparams={"lr": 1e-5}, compile=False)
    with caplog.at_level(logging.INFO, "selftune"):
        result = tuner.fit(batches[:12], batches[12:], steps=200, progress=False)
    assert result.why in caplog.text
    assert result.report().endswith(result.why)
    first = result.why.splitlines()[0]
    swept = result.history["lr"][0]
    assert first.startswith(f"lr: given 1e-05 → sweep {swept:.3g} → ")
    assert f"{result.hparams['lr']:.3g} by hypergradients" in first
