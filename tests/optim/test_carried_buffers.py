"""Buffers that training passes change. Truths: the buffers before a step, an undisturbed run."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st


class Codebook(nn.Module):
    """A running mean of its inputs, changed in place, from a pass on."""

    def __init__(self, late: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self._late = late

    def forward(self, x: Tensor) -> Tensor:
        self._late -= self.training
        if self.training and self._late < 0:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Normaliser(nn.Module):
    """Subtracts the mean of all inputs so far, with their count (Welford)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean += (x.detach().mean(0) - self.mean) / self.count
        return x - self.mean


class Recurrent(nn.Module):
    """A hidden state between batches, which each pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 4)
        self.register_buffer("hidden", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(len(x), 4) if self.hidden is None else self.hidden
        out = self.cell(x, hidden)
        self.hidden = out.detach()
        return out


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = {
        "late": lambda: Codebook(late=11),
        "converged": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1)),
        "codebook": Codebook, "normaliser": Normaliser, "recurrent": Recurrent,
        "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    }[kind]()  # fmt: skip
    last = nn.Linear(1 if kind == "converged" else 4, 1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), st.nn.Dropout(0.1), layer, last)


def loss(net: nn.Module, seed: int) -> Tensor:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def train(net: nn.Module, opt: Any, steps: range) -> int:
    """Returns how often validation losses were computed."""
    calls = []
    for step in steps:
        opt.zero_grad()
        loss(net, step).backward()
        opt.step()
        opt.hyper_step(lambda step=step: calls.append(step) or loss(net, 1000 + step))
    return len(calls)


KINDS = (
    "codebook",
    "normaliser",
    "recurrent",
    "spectral norm",
    "old spectral norm",
    "late",
    "converged",
)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_passes_in_training_mode_leave_them(kind: str) -> None:
    net = network(kind)
    opt = st.AdamW(net, every=2, probe=False, total_steps=100)
    taken = 0
    for step in range(20):
        opt.zero_grad()
        loss(net, step).backward()
        opt.step()
        kept = {n: b for n, b in net.named_buffers() if not n.endswith("key")}  # random numbers
        before = {n: b.clone() for n, b in kept.items()}
        assert before
        taken += opt.hyper_step(lambda step=step: loss(net, 1000 + step)) is not None
        for name, buffer in net.named_buffers():
            assert name not in before or torch.equal(buffer, before[name]), name
    assert taken > 5


@pytest.mark.parametrize("kind", KINDS[:5])
def test_a_resumed_run_is_the_same(kind: str) -> None:
    whole, half, resumed = network(kind), network(kind), network(kind)
    options: dict[str, Any] = dict(every=2, probe=False, total_steps=60)
    calls = train(whole, st.AdamW(whole, **options), range(60))
    first = st.AdamW(half, **options)
    before = train(half, first, range(25))
    if kind == "recurrent":
        resumed[3].register_buffer("hidden", torch.zeros(8, 4))
    resumed.load_state_dict(half.state_dict())
    second = st.AdamW(resumed, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert before + train(resumed, second, range(25, 60)) == calls
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Metric(nn.Module):
    """Sums losses, outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, loss: Tensor) -> Tensor:
        self.total += loss.detach()
        return loss


def test_metrics_in_a_closure_go_on() -> None:
    net, metric, losses = network("codebook"), Metric(), []
    opt = st.AdamW(net, every=1, probe=False)
    for step in range(3):
        loss(net, step).backward()
        opt.step()
        found = opt.hyper_step(lambda: metric(loss(net, 9)))
        losses.append(float(found))
    assert float(metric.total) >= sum(losses) * 0.999
