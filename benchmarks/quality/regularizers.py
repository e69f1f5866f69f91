"""One self-tuned run against searches over the same regularizers.

    python -m benchmarks.quality.regularizers --job digits|images|text [--trials 30]
        [--robust NAME]

``digits``: a CNN on 1,000 of scikit-learn's digits with four dropout rates and translation.
``images``: a CNN on 10,000 Fashion-MNIST images with three dropout rates, label smoothing and four
augmentations. ``text``: an LSTM on tiny-Shakespeare characters with seven regularizers. Searches
choose these, the learning rate and weight decay, for plain AdamW runs of the same length; every
run is judged at its averaged weights. Three splits: the validation loss tunes and chooses, the
test loss is reported. ``--robust`` starts a rate at 0 and at 0.9 instead: where does it end, and
with which loss? Needs optuna (extra ``bench``) and ``SELFTUNE_DATA``.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
UPDATE: Space = dict(lr=(1e-4, 3e-2), weight_decay=(1e-4, 1.0))


class PlainRun:
    """A plain AdamW run at fixed values, with linear decay; its copies go on from where it is.

    Args:
        job: What is trained.
        values: The regularizers, ``lr`` and ``weight_decay``.
        seed: Of the weights.
    """

    def __init__(self, job: Job, values: Mapping[str, float], seed: int) -> None:
        torch.manual_seed(seed)
        self.job, self.rate, self.taken = job, values["lr"], 0
        self.model, self.loss_fn, self.augment = job.make(), job.loss(), job.augment()
        self.set(values)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=self.rate, weight_decay=values["weight_decay"]
        )
        self.begin_average()

    def set(self, values: Mapping[str, float]) -> None:
        """Set all regularizers of the model, its loss and augmentation."""
        for part in (self.model, self.loss_fn, self.augment):
            for module in part.modules() if part is not None else ():
                if isinstance(module, st.nn.Tunable):
                    module.strength.fill_(values[module.hparam.name])

    def begin_average(self) -> None:
        """Average the weights from here on."""
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98),
            use_buffers=True,
        )  # fmt: skip

    def train(self, batches: Iterable[Batch]) -> None:
        """A step for each batch."""
        self.model.train()
        for x, y in batches:
            rate = self.rate * (1 - self.taken / self.job.steps)
            self.optimizer.param_groups[0]["lr"] = rate
            x, y = (x, y) if self.augment is None else self.augment(x, y)
            self.optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y) + st.nn.extra_loss(self.model)
            loss.backward()
            nn.utils.clip_grad_norm_(self.params, 10.0)
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.taken += 1

    def score(self, split: str) -> float:
        """Of the averaged weights."""
        return self.job.score(self.average.module, split)


def trial(job: Job, values: Mapping[str, float], seed: int) -> tuple[float, float, float]:
    """A plain AdamW run at fixed values: validation and test loss, seconds."""
    run = PlainRun(job, values, seed)
    start = time.perf_counter()
    run.train(itertools.islice(job.batches("train", seed), job.steps))
    taken = time.perf_counter() - start
    val, test = (x if math.isfinite(x) else math.inf for x in map(run.score, ("val", "test")))
    return val, test, taken


def self_tuned(
    job: Job, seed: int, starts: Mapping[str, float] | None = None, **options: Any
) -> tuple[float, float, float, dict[str, float]]:
    """One run of the tuner with its defaults: losses, seconds, and where its values ended."""
    torch.manual_seed(seed)
    model = job.make()
    given = {"lr": 1e-3, **(starts or {})}
    tuner = st.Tuner(model, job.loss(), augment=job.augment(), hparams=given, seed=seed, **options)
    seen: list[float] = []

    def timed() -> Iterator[Batch]:
        seen.append(time.perf_counter())
        yield from job.batches("train", seed)

    result = tuner.fit(
        timed(), Endless(job, seed), steps=job.steps, evaluate_every=job.steps // 10,
        progress=False,
    )  # fmt: skip
    taken = time.perf_counter() - seen[0]
    return job.score(model, "val"), job.score(model, "test"), taken, result.hparams


class Endless:
    """The validation set in whole batches, shuffled anew each time."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job, self.seed = job, seed

    def __len__(self) -> int:
        return len(self.job.splits["val"][0]) // self.job.batch

    def __iter__(self) -> Iterator[Batch]:
        self.seed += 1000
        stream = self.job.batches("val", self.seed)
        for _ in range(len(self)):
            yield next(stream)


def search(
    job: Job, sampler: str, trials: int, seed: int, journal: str | None
) -> tuple[float, float, float]:
    """The trial with the lowest validation loss: that, its test loss, and seconds of all."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind = {"random": optuna.samplers.RandomSampler, "TPE": optuna.samplers.TPESampler}[sampler]
    storage = journal and JournalStorage(JournalFileBackend(journal))
    name = f"{sampler} {seed}"
    study = optuna.create_study(
        sampler=kind(seed=seed), storage=storage, study_name=name, load_if_exists=True
    )

    def objective(asked: optuna.Trial) -> float:
        space = {**UPDATE, **job.space}
        values = {n: asked.suggest_float(n, *ends, log=True) for n, ends in space.items()}
        val, test, taken = trial(job, values, seed)
        asked.set_user_attr("test", test)
        asked.set_user_attr("taken", taken)
        return val if math.isfinite(val) else 1e9

    study.optimize(objective, n_trials=max(0, trials - len(study.trials)))
    best = study.best_trial
    total = sum(t.user_attrs.get("taken", 0.0) for t in study.trials)
    return study.best_value, best.user_attrs["test"], total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=tuple(JOBS), required=True)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--robust", help="a rate to start at 0 and at 0.9 instead")
    parser.add_argument("--journal", help="file that keeps the searches' trials, to go on later")
    parser.add_argument("--only", choices=("searches", "self-tuned"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    job = JOBS[args.job]()
    print("| method | seed | validation | test | seconds |\n|---|---|---|---|---|")

    def row(label: str, seed: int, found: tuple[float, float, float]) -> None:
        val, test, taken = found
        print(f"| {label} | {seed} | {val:.4f} | {test:.4f} | {taken:.0f} |", flush=True)

    for seed in range(args.seeds):
        starts = [{args.robust: rate} for rate in (0.0, 0.9)] if args.robust else [{}]
        for start in () if args.only == "searches" else starts:
            *found, ends = self_tuned(job, seed, start)
            told = "".join(f", {name} from {rate:g}" for name, rate in start.items())
            row("one self-tuned run" + told, seed, (found[0], found[1], found[2]))
            print(f"<!-- { ({n: round(v, 4) for n, v in ends.items()}) } -->", flush=True)
        for sampler in () if args.robust or args.only == "self-tuned" else ("random", "TPE"):
            best = search(job, sampler, args.trials, seed, args.journal)
            row(f"best of {args.trials}, {sampler}", seed, best)


if __name__ == "__main__":
    main()
