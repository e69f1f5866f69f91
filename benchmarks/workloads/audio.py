"""Audio: spoken digits as spectrograms, a residual network with BatchNorm."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Workload, folder


@cache
def spectrograms() -> tuple[Tensor, Tensor]:
    """Logarithmic spectrograms of 3,000 recordings, shape (3000, 1, 32, 32), and the digits."""
    with np.load(folder() / "spoken_digits.npz", allow_pickle=False) as file:
        sound, y = torch.tensor(file["x"]).float() / 32768, torch.tensor(file["y"])
    window = torch.hann_window(256)
    power = torch.stft(sound, 256, hop_length=188, window=window, return_complex=True).abs()
    return (F.adaptive_avg_pool2d(power, (32, 32)) + 1e-3).log().unsqueeze(1), y


class Residual(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm around an identity, or a 1 × 1 convolution.

    Source: He et al. 2016.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            *(nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = (
            nn.Identity() if (inputs, stride) == (outputs, 1)
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                               nn.BatchNorm2d(outputs))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Activations, shape (batch, outputs, height / stride, width / stride)."""
        return F.relu(self.path(x) + self.shortcut(x))


def resnet(width: int = 12) -> nn.Module:
    """A residual network of three blocks at 16 × 16, 8 × 8 and 4 × 4; 44,000 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(Residual(width, width, 1), Residual(width, 2 * width, 2)),
        *(Residual(2 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4 * width, 10),
    )


@cache
def spoken_resnet() -> Workload:
    """1,000 recordings to train on, 600 to validate, 1,400 to test; a small residual network."""
    x, y = spectrograms()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split((1000, 600, 1400)), strict=True))
    x = (x - x[parts["train"]].mean()) / x[parts["train"]].std()
    return Workload(
        name="spoken-resnet", make_model=resnet, batch_size=32, steps=400,
        splits={k: (x[p], y[p]) for k, p in parts.items()},
    )  # fmt: skip
