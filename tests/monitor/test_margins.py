"""The charts of hyperparameters with margins. Law: value, low and high have the same steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.monitor import InMemory

Batch = tuple[Tensor, Tensor]


def job() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    x = torch.randn(160, 4)
    return nn.Linear(4, 1), [(part, part.sum(1, keepdim=True)) for part in x.split(16)]


def steps(log: InMemory, tag: str) -> list[int]:
    return [row.step for row in log.rows if row.tag == tag]


def assert_drawn(log: InMemory) -> None:
    for name in ("lr", "beta1", "weight_decay"):
        at = steps(log, f"hyper/{name}")
        assert at
        for end in ("low", "high"):
            assert steps(log, f"margin/{name}/{end}") == at, (name, end)


def test_of_a_tuner_with_a_sweep() -> None:
    model, batches = job()
    log = InMemory()
    tuner = st.Tuner(model, F.mse_loss, compile=False)
    tuner.fit(batches[:8], batches[8:], steps=120, log_every=1, recorder=log, progress=False)
    assert_drawn(log)


def test_of_an_optimizer() -> None:
    model, batches = job()
    log = InMemory()
    opt = st.AdamW(model, total_steps=120, log_dir=log)
    for step in range(120):
        x, y = batches[step % 8]
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        opt.step()
        opt.hyper_step(lambda: F.mse_loss(model(batches[8][0]), batches[8][1]))
    opt.finish()
    assert_drawn(log)
