"""A tuned run's schedule on a plain torch optimizer. Truth: the tuned run, within noise."""

import statistics
from pathlib import Path

import pytest
import torch
from jobs import Batch, loss_of
from torch import nn
from torch.nn import functional as F

import selftune as st


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


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [(st.rules.SGD(), torch.optim.SGD), (st.rules.AdamW(), torch.optim.AdamW)],
    ids=["SGD", "AdamW"],
)
def test_a_replayed_run_ends_where_the_tuned_run_ends(
    rule: st.rules.AbstractRule, optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    train, val, test = digits()
    tuned, replayed = [], []
    for seed in range(3):
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
    difference = abs(statistics.mean(tuned) - statistics.mean(replayed))
    assert difference <= max(spread, 0.15 * statistics.mean(tuned)), (tuned, replayed)
