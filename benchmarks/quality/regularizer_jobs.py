"""The jobs on which tuned regularizers are compared with searches."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

Batch = tuple[Tensor, Tensor]
Space = dict[str, tuple[float, float]]
RATE = (0.01, 0.9)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and between which bounds its regularizers are searched.

    Attributes:
        make: Builds the model.
        loss: Builds the loss.
        augment: Builds the augmentation, or None.
        splits: Train, val and test.
        batch: Examples in a batch.
        steps: Length of a run.
        space: Bounds of a log-uniform choice by name.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    augment: Callable[[], nn.Module | None]
    splits: dict[str, Batch]
    batch: int
    steps: int
    space: Space

    def batches(self, split: str, seed: int) -> Iterator[Batch]:
        """Endless shuffled batches."""
        x, y = self.splits[split]
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(len(x), generator=generator).split(self.batch):
                if len(part) == self.batch:
                    yield x[part], y[part]

    @torch.no_grad()
    def score(self, model: nn.Module, split: str) -> float:
        """The mean cross-entropy of a split."""
        model.eval()
        x, y = self.splits[split]
        parts = zip(x.split(500), y.split(500), strict=True)
        return sum(float(F.cross_entropy(model(a), b)) * len(a) for a, b in parts) / len(x)


def data(name: str) -> Path:
    """A file of the data folder."""
    return Path(os.environ["SELFTUNE_DATA"]) / name


def cnn(width: int = 8, side: int = 28, rate: float = 0.1) -> nn.Sequential:
    """Two convolutions with BatchNorm, and two layers, with a dropout rate after each but the last.

    Args:
        width: Channels of the first convolution.
        side: Of the images, in pixels.
        rate: Of dropout, at the start.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        st.nn.Dropout2d(rate, "first"),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.MaxPool2d(2), st.nn.Dropout2d(rate, "second"), nn.Flatten(),
        nn.Linear(2 * width * (side // 4) ** 2, 64), nn.ReLU(), st.nn.Dropout(rate, "third"),
        nn.Linear(64, 10),
    )  # fmt: skip


class CharLSTM(nn.Module):
    """An LSTM over characters with dropout in five places and penalties of its activations."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.words = st.nn.EmbeddingDropout(nn.Embedding(65, width), 0.1, "embedding")
        self.input = st.nn.Dropout(0.1, "input", share=(1,))
        self.lstm = st.nn.DropConnect(nn.LSTM(width, width, batch_first=True), 0.1, "dropconnect")
        self.hidden = st.nn.Dropout(0.1, "hidden", share=(1,))
        self.second = nn.LSTM(width, width, batch_first=True)
        self.output = st.nn.Dropout(0.1, "output", share=(1,))
        self.ar, self.tar = st.nn.ActivationPenalty(1e-2), st.nn.TemporalPenalty(1e-2)
        self.head = nn.Linear(width, 65)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 65, time)."""
        seen = self.hidden(self.lstm(self.input(self.words(x)))[0])
        last = self.output(self.tar(self.second(seen)[0]))
        return self.head(self.ar(last)).transpose(1, 2)


@cache
def images() -> Job:
    """Fashion-MNIST, 10,000 images to train on."""
    with np.load(data("fashion_mnist.npz")) as file:
        x = torch.tensor(file["x_train"], dtype=torch.float32).unsqueeze(1) / 255
        y = torch.tensor(file["y_train"].astype(np.int64))
        test = torch.tensor(file["x_test"], dtype=torch.float32).unsqueeze(1) / 255
        labels = torch.tensor(file["y_test"].astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x[order] - 0.286) / 0.353, y[order]
    splits = {"train": (x[:10000], y[:10000]), "val": (x[10000:15000], y[10000:15000]),
              "test": ((test - 0.286) / 0.353, labels)}  # fmt: skip
    return Job(
        make=cnn, loss=lambda: st.nn.LabelSmoothing(0.05),
        augment=lambda: st.nn.Augment(st.nn.Translate(0.02), st.nn.Scale(0.02),
                                      st.nn.Brightness(0.05), st.nn.Cutout(0.1)),
        splits=splits, batch=50, steps=3000,
        space=dict(first=RATE, second=RATE, third=RATE, label_smoothing=(1e-3, 0.5),
                   translate=(1e-3, 0.5), scale=(1e-3, 0.5), brightness=(1e-3, 2.0),
                   cutout=(0.01, 4.0)),
    )  # fmt: skip


@cache
def text() -> Job:
    """Tiny Shakespeare in pieces of 32 characters, 3,000 to train on."""
    raw = gzip.decompress(data("tinyshakespeare.txt.gz").read_bytes()).decode()
    index = {c: i for i, c in enumerate(sorted(set(raw)))}
    codes = torch.tensor([index[c] for c in raw])
    pieces = codes[: len(codes) // 33 * 33].view(-1, 33)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    pieces = pieces[order]
    cut = {"train": pieces[:3000], "val": pieces[3000:5000], "test": pieces[5000:8000]}
    return Job(
        make=CharLSTM, loss=nn.CrossEntropyLoss, augment=lambda: None,
        splits={n: (p[:, :-1], p[:, 1:]) for n, p in cut.items()}, batch=32, steps=2000,
        space=dict(embedding=RATE, input=RATE, dropconnect=RATE, hidden=RATE, output=RATE,
                   ar=(1e-5, 10.0), tar=(1e-5, 10.0)),
    )  # fmt: skip


@cache
def digits() -> Job:
    """scikit-learn's digits at 16×16, 1,000 to train on, 25 epochs."""
    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    y = torch.tensor(loaded.target)[order]
    cut = {"train": slice(0, 1000), "val": slice(1000, 1400), "test": slice(1400, None)}
    return Job(
        make=lambda: cnn(16, 16, 0.05).insert(0, st.nn.Dropout(0.05, "input")),
        loss=nn.CrossEntropyLoss, augment=lambda: st.nn.Augment(st.nn.Translate(0.02)),
        splits={n: (x[part] - 0.3, y[part]) for n, part in cut.items()}, batch=32, steps=775,
        space=dict(input=RATE, first=RATE, second=RATE, third=RATE, translate=(1e-3, 0.3)),
    )  # fmt: skip


JOBS = {"digits": digits, "images": images, "text": text}
