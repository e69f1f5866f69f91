"""Further workloads, of other kinds again; added after the extended list had been used."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, divided, folder
from benchmarks.workloads.generative import mixture_density, vae
from benchmarks.workloads.images import load_fashion_mnist
from benchmarks.workloads.synthetic import adding, factors, teacher
from benchmarks.workloads.text import characters, shakespeare


def _images() -> dict[str, tuple[Tensor, Tensor]]:
    x, y = load_fashion_mnist()[:2]
    return divided(x.flatten(1), y, (10_000, 3000, 5000))


@cache
def logistic() -> Workload:
    """Multinomial logistic regression of Fashion-MNIST, a convex problem."""
    return Workload(
        name="logistic", make_model=lambda: nn.Linear(784, 10), splits=_images(), batch_size=64,
        steps=800,
    )  # fmt: skip


def _deep() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(784, 64), nn.ReLU()]
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


@cache
def deep_mlp() -> Workload:
    """Ten layers without norm or residual connections, on Fashion-MNIST."""
    return Workload(name="deep-mlp", make_model=_deep, splits=_images(), batch_size=64, steps=800)


@cache
def window_model() -> Workload:
    """The next character of Shakespeare from the ten before, by an MLP on embeddings.

    Source: Bengio et al. 2003.
    """
    text = characters(shakespeare())
    count, windows = int(text.max()) + 1, text.unfold(0, 11, 1)
    return Workload(
        name="window-model", batch_size=64, steps=1500,
        splits=divided(windows[:, :10], windows[:, 10], (100_000, 5000, 5000)),
        make_model=lambda: nn.Sequential(
            nn.Embedding(count, 24), nn.Flatten(), nn.Linear(240, 200), nn.Tanh(),
            nn.Linear(200, count),
        ),
    )  # fmt: skip


class Dilated(nn.Module):
    """Causal convolutions with growing dilation and residual connections.

    Source: van den Oord et al. 2016.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, width, 2), nn.Conv1d(width, 1, 1)
        self.blocks = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**k) for k in range(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """The next sample at each place, shape (batch, length)."""
        h = F.elu(self.first(F.pad(x.unsqueeze(1), (1, 0))))
        for power, block in enumerate(self.blocks, start=1):
            h = h + F.elu(block(F.pad(h, (2**power, 0))))
        return self.last(h).squeeze(1)


@cache
def sound_wave() -> Workload:
    """The next sample of spoken digits; mean square error."""
    with np.load(folder() / "spoken_digits.npz", allow_pickle=False) as file:
        sound = torch.from_numpy(file["x"]).float()
    middle = sound.shape[1] // 2
    piece = sound[:, middle : middle + 257]
    piece = (piece - piece.mean()) / piece.std()
    return Workload(
        name="sound-wave", make_model=Dilated, batch_size=16, steps=600, criterion=F.mse_loss,
        splits=divided(piece[:, :-1], piece[:, 1:], (2100, 300, 600)),
    )  # fmt: skip


def pinball(outputs: Tensor, y: Tensor) -> Tensor:
    """The quantile loss at 0.9."""
    return torch.maximum(0.9 * (y - outputs), -0.1 * (y - outputs)).mean()


@cache
def quantile() -> Workload:
    """The 0.9 quantile of a power plant's output."""
    with np.load(folder() / "uci" / "power.npz", allow_pickle=False) as file:
        x, y = (torch.tensor(file[k], dtype=torch.float32) for k in ("x", "y"))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).view(-1, 1)
    return Workload(
        name="quantile", batch_size=64, steps=1500, criterion=pinball,
        splits=divided(x, y, (6000, 1500, 2000)),
        make_model=lambda: nn.Sequential(
            nn.Linear(x.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        ),
    )  # fmt: skip


FURTHER: dict[str, Callable[[], Workload]] = {
    "logistic": logistic,
    "deep-mlp": deep_mlp,
    "vae": vae,
    "mixture-density": mixture_density,
    "window-model": window_model,
    "sound-wave": sound_wave,
    "quantile": quantile,
    "factors": factors,
    "teacher": teacher,
    "adding": adding,
}
"""The further workloads, by name."""
