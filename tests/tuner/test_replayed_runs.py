"""A tuned run's schedule on a plain torch optimizer. Truth: the tuned run, within noise."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import Batch, loader, loss_of, points, tuner
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune.tuner._result import History, schedule_of


def digits() -> tuple[Batch, Batch, Batch]:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(inputs), generator=generator)
    x = torch.tensor(inputs, dtype=torch.float32)[order] / 16 - 0.3
    y = torch.tensor(targets)[order]
    return (x[:1000], y[:1000]), (x[1000:1400], y[1000:1400]), (x[1400:], y[1400:])


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [(st.rules.SGD(), torch.optim.SGD), (st.rules.AdamW(), torch.optim.AdamW)],
    ids=["SGD", "AdamW"],
)
def test_a_replayed_run_ends_where_the_tuned_run_ends(
    rule: st.rules.AbstractRule, optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    # Medians: at the edge of stability, a replay of SGD without a guard may diverge.
    train, val, test = digits()
    tuned, replayed = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        order = [torch.randint(1000, (50,)) for _ in range(400)]
        batches = [(train[0][i], train[1][i]) for i in order]
        model = net(seed)
        run = st.Tuner(model, F.cross_entropy, rule=rule, compile=False)
        result = run.fit(batches, [val], steps=400, evaluate_every=400, progress=False)
        result.schedule.save(tmp_path / "schedule.json")
        tuned.append(loss_of(model, test))
        plain = net(seed)
        opt = optimizer(plain.parameters(), lr=1.0)
        follow = st.replay(opt, tmp_path / "schedule.json")
        for x, y in batches[-result.schedule.steps :]:
            opt.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            opt.step()
            follow.step()
        replayed.append(loss_of(plain, test))
    spread = max(tuned) - min(tuned)
    difference = abs(statistics.median(tuned) - statistics.median(replayed))
    assert difference <= max(spread, 0.15 * statistics.median(tuned)), (tuned, replayed)


@pytest.mark.parametrize(
    ("rule", "optimizer", "zero"),
    [
        (st.rules.AdamW(), torch.optim.AdamW, "weight_decay"),
        (st.rules.Adam(), torch.optim.Adam, "beta1"),
        (st.rules.SGD(), lambda params: torch.optim.SGD(params, momentum=0.9), "momentum"),
    ],
    ids=["AdamW", "Adam", "SGD"],
)
def test_values_of_0_are_replayed(rule: st.rules.AbstractRule, optimizer: Any, zero: str) -> None:
    """Truth: the losses of the tuned run, to rounding (torch's default was used instead)."""
    x = torch.randn(160, 8, generator=torch.Generator().manual_seed(0)).double()
    batches = list(zip(x.split(40), (x[:, :1] * x[:, 1:2]).split(40), strict=True))

    def small() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    run = st.Tuner(small(), F.mse_loss, rule=rule, hparams={"lr": 1e-2, zero: 0.0}, tune=("lr",),
                   compile=False, probe=False)  # fmt: skip
    result = run.fit(batches[:3], batches[3:], epochs=10, progress=False)
    plain = small()
    opt = optimizer(plain.parameters())
    follow = st.replay(opt, result.schedule)
    losses = []
    for inputs, targets in batches[:3] * 10:
        opt.zero_grad()
        loss = F.mse_loss(plain(inputs), targets)
        losses.append(loss.item())
        loss.backward()
        opt.step()
        follow.step()
    assert losses == pytest.approx(result.history["train_loss"].tolist(), rel=1e-9)


def test_steps_that_a_rewind_undid_are_not_replayed() -> None:
    """Ten steps at a rate of 1, ten at 5 that were undone from step 8 on, ten at 2."""
    history = History()
    for step, rate in ((0, 1.0), (10, 5.0), (20, 2.0)):
        history.hyper(step, 0.0, {"lr": rate})
    history.undone.append([8, 20])
    steps = SimpleNamespace(
        rates=torch.ones(1), update=SimpleNamespace(rule=st.rules.SGD()), chosen=None
    )
    schedule = schedule_of(history, steps, {"lr": 2.0, "decay": 0.0}, 30)
    assert schedule.steps == 18
    assert [schedule.at(step)["lr"] for step in (0, 7, 8, 17)] == [1.0, 1.0, 2.0, 2.0]


def test_a_run_that_goes_back_says_which_steps_it_undid() -> None:
    """Validation turns bad for good at once, which no hyperparameter can have caused."""
    x, y = points(100, seed=1)
    bad = (x, (y + 1) % 3)
    val = [(x, y)] * 20 + [bad] * 60
    result = tuner().fit(loader(), val, steps=300, evaluate_every=300, progress=False)
    back = result.history["rewinds"]
    assert len(back) >= 1
    assert result.schedule.steps < 300 - result.history["hyper_step"][0]


@pytest.mark.parametrize("tune", [("lr",), ("lr", "hidden")])
def test_a_given_strength_is_replayed(tune: tuple[str, ...]) -> None:
    """Truth: the losses of the run, also if the strength was not tuned."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, generator=generator, dtype=torch.float64)
    batches = [(part, part[:, :1]) for part in x.split(20)]

    def make() -> nn.Module:
        torch.manual_seed(3)
        layers = nn.Linear(6, 8), nn.Tanh(), st.nn.Dropout(0.2, name="hidden"), nn.Linear(8, 1)
        return nn.Sequential(*layers).double()

    run = st.Tuner(
        make(), F.mse_loss, rule=st.rules.SGD(), hparams={"lr": 0.02, "hidden": 0.6}, tune=tune,
        probe=False, guard=False, compile=False,
    )  # fmt: skip
    result = run.fit(batches[:6], batches[6:], epochs=4, progress=False)
    assert "hidden" in result.hparams
    plain, losses = make(), []
    opt = torch.optim.SGD(plain.parameters(), lr=1.0)
    follow = st.replay(opt, result.schedule, model=plain)
    for a, b in batches[:6] * 4:
        opt.zero_grad()
        loss = F.mse_loss(plain(a), b)
        losses.append(float(loss.detach()))
        loss.backward()
        opt.step()
        follow.step()
    assert losses == pytest.approx(result.history["train_loss"].tolist())
