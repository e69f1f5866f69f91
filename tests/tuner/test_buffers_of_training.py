"""Buffers that training passes change. Truths: unit spectral norm, the data's mean, whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Outage, same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import selftune as st

MEAN = 20.0


class Normaliser(nn.Module):
    """Subtracts a running mean of its inputs, which passes in training mode update."""

    mean: Tensor

    def __init__(self, *, bound_anew: bool) -> None:
        super().__init__()
        self._anew = bound_anew
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self._anew:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            else:
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x = MEAN + torch.randn(count, 16, 4, generator=torch.Generator().manual_seed(seed))
    return list(zip(x, (x[..., :2] - MEAN).argmax(-1), strict=True))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    first = Normaliser(bound_anew=kind == "bound anew")
    middle = nn.Linear(4, 16)
    if kind == "spectral norm":
        middle = spectral_norm(middle)
    if kind == "one output":
        last = spectral_norm(nn.Linear(16, 1))
        return nn.Sequential(first, middle, nn.ReLU(), last, nn.Linear(1, 3))
    return nn.Sequential(first, middle, nn.ReLU(), nn.Linear(16, 3))


def fit(model: nn.Module, **options: Any) -> st.TuningResult:
    settings = {
        n: options.pop(n) for n in ("population", "exploit_every", "compile") if n in options
    }
    options = {"epochs": 5, **options}
    run = st.Tuner(model, F.cross_entropy, **{"compile": False, **settings})
    return run.fit(batches(20, 0), batches(4, 1), progress=False, **options)


@pytest.mark.parametrize(
    ("population", "compiled"),
    [(1, False), (3, False), pytest.param(1, True, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("traced")
def test_a_running_mean_is_that_of_the_data(population: int, compiled: bool) -> None:
    model = network("in place")
    result = fit(model, population=population, compile=compiled)
    torch.testing.assert_close(model[0].mean, torch.full((4,), MEAN), atol=0.5, rtol=0)
    assert result.best_loss < 0.3


def test_a_buffer_that_is_bound_anew_counts_too() -> None:
    model = network("bound anew")
    fit(model)
    torch.testing.assert_close(model[0].mean, torch.full((4,), MEAN), atol=0.5, rtol=0)


def test_spectral_norms_stay_at_one() -> None:
    model = network("spectral norm")
    fit(model)
    model.eval()
    assert float(torch.linalg.matrix_norm(model[1].weight.detach(), 2)) == pytest.approx(
        1, abs=0.05
    )


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def fail(progress: Any) -> None:
        if progress.step == 40:
            raise Outage

    options: dict[str, Any] = dict(epochs=3, evaluate_every=20)
    whole = fit(network("spectral norm"), log_dir=tmp_path / "whole", **options)
    with pytest.raises(Outage):
        fit(network("spectral norm"), log_dir=tmp_path / "cut", callbacks=[fail], **options)
    resumed = fit(network("spectral norm"), log_dir=tmp_path / "cut", resume=True, **options)
    assert same(resumed.history, whole.history)
    assert same(resumed.best_weights, whole.best_weights)


class Flagged(nn.Module):
    """Subtracts the mean of the first training batch, once a flag says that it is known."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("ready", torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            self.mean.copy_(x.mean(0))
            self.ready.fill_(1)
        return x - self.mean if self.ready else x


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_flags_and_counts_are_those_of_training(dtype: torch.dtype) -> None:
    """Truth: the same module with a flag of float32."""
    results, flags = [], []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        model = nn.Sequential(Flagged(kind), nn.Linear(4, 3))
        seen = lambda progress, m=model: flags.append(bool(m[0].ready))  # noqa: E731
        results.append(fit(model, callbacks=[seen]))
    assert all(flags)
    assert results[0].best_loss == results[1].best_loss


class Cached(nn.Module):
    """A causal mean whose mask is made at the first call, and made anew for longer sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.mask is None or len(self.mask) < length:
            mask = torch.ones(length, length).tril() / length
            self.register_buffer("mask", mask, persistent=False)
        return (self.mask[:length, :length] @ self.layer(x))[:, -1]


def sequences(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, n, 4, generator=generator), torch.arange(16) % 3) for n in lengths]


def test_a_buffer_that_the_first_call_makes() -> None:
    """Truth: the model that was called before."""
    losses = []
    for called in (False, True):
        torch.manual_seed(0)
        model, data = Cached(), sequences([5] * 20)
        if called:
            model(data[0][0])
        tuner = st.Tuner(model, F.cross_entropy, compile=False)
        losses.append(tuner.fit(data[4:], data[:4], epochs=4, progress=False).best_loss)
    assert losses[0] == pytest.approx(losses[1])


def test_a_buffer_that_grows_is_named() -> None:
    model, data = Cached(), sequences([4, 5, 6, 7] * 4)
    model(data[0][0])
    tuner = st.Tuner(model, F.cross_entropy, compile=False)
    with pytest.raises(ValueError, match=r"mask changed its shape .* \(4, 4\) to .* largest input"):
        tuner.fit(data, data[:4], epochs=2, progress=False)
    tuner = st.Tuner(model, F.cross_entropy, compile=False)
    model(data[3][0])
    tuner.fit(data, data[:4], epochs=2, progress=False)
