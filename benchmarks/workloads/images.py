"""Images: digits and clothes, some with wrong labels, few examples or no labels at all."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads._base import Batch, Workload


@cache
def digits() -> Workload:
    """scikit-learn's digits with 15 % of the training labels replaced at random; an MLP."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.tensor(bunch.data, dtype=torch.float32) / 16 - 0.3
    targets = torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(inputs), generator=generator)
    inputs, targets = inputs[order], targets[order]
    noisy = targets[:1000].clone()
    wrong = torch.rand(1000, generator=generator) < 0.15
    noisy[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return Workload(
        name="digits",
        make_model=lambda: nn.Sequential(
            *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        ),
        splits={
            "train": (inputs[:1000], noisy),
            "val": (inputs[1000:1400], targets[1000:1400]),
            "test": (inputs[1400:], targets[1400:]),
        },
        batch_size=64,
        steps=2000,
    )


def small_cnn() -> nn.Module:
    """Two convolutions with BatchNorm and two linear layers: 106,218 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


@cache
def fashion() -> Workload:
    """8,000 Fashion-MNIST images to train on, 4,000 to validate; a small CNN, 480 steps."""
    train_x, train_y, test_x, test_y = load_fashion_mnist()
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))[:12_000]
    train_x, train_y = train_x[order], train_y[order]
    return Workload(
        name="fashion",
        make_model=small_cnn,
        splits={
            "train": (train_x[:8000], train_y[:8000]),
            "val": (train_x[8000:], train_y[8000:]),
            "test": (test_x, test_y),
        },
        batch_size=100,
        steps=480,
    )


def load_fashion_mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fashion-MNIST from ``$SELFTUNE_DATA``, or downloaded by torchvision; standardised."""
    folder = os.environ.get("SELFTUNE_DATA")
    if folder:
        with np.load(Path(folder) / "fashion_mnist.npz", allow_pickle=False) as data:
            arrays = [torch.from_numpy(data[k]) for k in ("x_train", "y_train", "x_test", "y_test")]
    else:
        from torchvision.datasets import FashionMNIST

        sets = [FashionMNIST("data", train=train, download=True) for train in (True, False)]
        arrays = [part for one in sets for part in (one.data, one.targets)]
    train_x, train_y, test_x, test_y = arrays
    return _standardise(train_x), train_y.long(), _standardise(test_x), test_y.long()


def _standardise(images: Tensor) -> Tensor:
    return (images.float().unsqueeze(1) / 255 - 0.286) / 0.353


def as_pixels(standardised: Tensor) -> Tensor:
    """Pixels in [0, 1] of standardised images."""
    return (0.353 * standardised + 0.286).clamp(0, 1)


@cache
def few_digits() -> Workload:
    """200 digits to learn from, 400 to validate: what a long run over-fits."""
    x, y = digits().splits["test"]
    clean_x, clean_y = digits().splits["val"]
    train = digits().splits["train"]
    return replace(
        digits(), name="few-digits", steps=1000,
        splits={"train": (train[0][:200], train[1][:200]), "val": (clean_x, clean_y),
                "test": (x, y)},
    )  # fmt: skip


def _clothes(train: int, val: int, test: int) -> dict[str, Batch]:
    """Parts of Fashion-MNIST."""
    x, y, test_x, test_y = load_fashion_mnist()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: train + val]
    x, y = x[order], y[order]
    return {
        "train": (x[:train], y[:train]),
        "val": (x[train:], y[train:]),
        "test": (test_x[:test], test_y[:test]),
    }


class TinyViT(nn.Module):
    """A vision transformer: 16 patches of 7 × 7, two blocks; 58,000 parameters."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 10)."""
        seen = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(seen).mean(1))


@cache
def fashion_cnn() -> Workload:
    """``fashion`` with fewer images to validate and to test, for the suite."""
    splits = _clothes(8000, 2000, 4000)
    return replace(fashion(), name="fashion-cnn", splits=splits, steps=400)


@cache
def fashion_vit() -> Workload:
    """8,000 images; a tiny vision transformer."""
    return replace(fashion_cnn(), name="fashion-vit", make_model=TinyViT, batch_size=64)


@cache
def noisy_fashion() -> Workload:
    """4,000 images to train on, 40 % of their labels wrong: regularization decides."""
    splits = _clothes(4000, 2000, 4000)
    x, y = splits["train"]
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(y), generator=generator) < 0.4
    y = torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)
    return replace(
        fashion_cnn(), name="noisy-fashion", splits={**splits, "train": (x, y)}, batch_size=64,
    )  # fmt: skip


@cache
def autoencoder() -> Workload:
    """Images of clothes through 32 numbers and back; mean square error."""
    splits = {n: (x.flatten(1), x.flatten(1)) for n, (x, _) in _clothes(8000, 2000, 4000).items()}
    return Workload(
        name="autoencoder", criterion=F.mse_loss, splits=splits, batch_size=64, steps=500,
        make_model=lambda: nn.Sequential(
            *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 32)),
            *(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 784)),
        ),
    )  # fmt: skip
