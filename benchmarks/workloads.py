"""Real training jobs, defined in plain torch and shared by every benchmark.

A workload says what is trained, on what, for how long and how it is judged; it knows nothing
of selftune. All randomness comes from the seed a caller passes, so that every method sees the
same initial weights and the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, three disjoint splits, a batch size and a number of steps."""

    name: str
    make_model: Callable[[], nn.Module]
    splits: dict[str, Batch]  # "train", "val", "test"
    batch_size: int
    steps: int

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised model."""
        torch.manual_seed(seed)
        return self.make_model()

    def batches(self, split: str, seed: int) -> Iterator[Batch]:
        """Endless shuffled batches of a split, an epoch at a time."""
        inputs, targets = self.splits[split]
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                index = order[start : start + self.batch_size]
                yield inputs[index], targets[index]

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy of a batch."""
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        """The mean loss over a whole split, in evaluation mode."""
        training = model.training
        model.eval()
        inputs, targets = self.splits[split]
        losses = [
            self.loss(model, (x, y)).item() * len(x)
            for x, y in zip(inputs.split(1000), targets.split(1000), strict=True)
        ]
        model.train(training)
        return sum(losses) / len(inputs)


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


WORKLOADS: dict[str, Callable[[], Workload]] = {"digits": digits, "fashion": fashion}
