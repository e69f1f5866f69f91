"""Batches that follow the noise scale against fixed ones: examples and time to a validation loss.

An MLP on 40,000 images of Fashion-MNIST, `st.AdamW` with its rate tuned, until the loss of 2,000
other images at the averaged weights is below the target. Each gradient of an example counts once;
every eighth batch is divided into two micro-batches, from which the noise scale is estimated. With
the overhead of a step, measured before, sizes minimise the time. Means over seeds, in which runs
of all rows alternate; ratios are geometric means over seeds relative to the size with the lowest
one, ± standard errors of pairs.

    SELFTUNE_DATA=... python -m benchmarks.batches [--seeds 10] [--target 0.37] [--driver tuner]

``st.Tuner`` divides the batches itself; it is evaluated at the first step after as many examples.

Typical output (one core, torch 2.13):

    | batch | examples to the target | ÷ best fixed | seconds | ÷ best fixed | last size |
    |---|---|---|---|---|---|
    | 16 | 94,800 | 1.38 ± 0.23 | 11.16 | 7.45 ± 1.73 | 16 |
    | 32 | 57,200 | 1.00 ± 0.00 | 3.52 | 2.91 ± 0.36 | 32 |
    | 64 | 54,432 | 1.08 ± 0.12 | 1.81 | 1.77 ± 0.08 | 64 |
    | 128 | 61,370 | 1.20 ± 0.17 | 1.30 | 1.25 ± 0.10 | 128 |
    | 256 | 68,070 | 1.36 ± 0.17 | 1.02 | 1.00 ± 0.00 | 256 |
    | 512 | 97,203 | 1.95 ± 0.25 | 1.17 | 1.15 ± 0.04 | 512 |
    | noise scale, from 16 | 53,059 | 1.05 ± 0.13 | 1.44 | 1.40 ± 0.06 | 205 |
    | noise scale, from 32 | 61,536 | 1.16 ± 0.15 | 1.69 | 1.62 ± 0.10 | 179 |
    | noise scale and overhead, from 128 | 62,195 | 1.19 ± 0.15 | 1.41 | 1.31 ± 0.12 | 179 |
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import selftune as st

FIXED = (16, 32, 64, 128, 256, 512)
TRAIN, VAL, BETWEEN, MOST, EVERY = 40_000, 2_000, 4_000, 400_000, 8
"""Examples to train on, to tune on, between two evaluations, and at most; batches between two that
are divided into micro-batches."""


def images(seed: int) -> tuple[Tensor, Tensor]:
    """A random subset, standardised, flat."""
    file = np.load(Path(os.environ["SELFTUNE_DATA"]) / "fashion_mnist.npz")
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(file["x_train"]), generator=generator)[: TRAIN + VAL].numpy()
    x = (torch.from_numpy(file["x_train"][pick]).float() / 255 - 0.286) / 0.353
    return x.flatten(1), torch.from_numpy(file["y_train"][pick]).long()


@dataclass(frozen=True)
class Following:
    """Batches that follow the noise scale.

    Attributes:
        start: Their size at the beginning; the least one, if time does not count.
        timed: Whether sizes minimise time instead of examples.
    """

    start: int
    timed: bool = False


ROWS: dict[str, int | Following] = {str(size): size for size in FIXED} | {
    "noise scale, from 16": Following(16),
    "noise scale, from 32": Following(32),
    "noise scale and overhead, from 128": Following(128, timed=True),
}
"""Sizes of batches: fixed, or following the noise scale."""


def network() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def overhead(x: Tensor, y: Tensor) -> float:
    """That of a training step, on another network."""
    model = network()
    opt = st.AdamW(model, lr=1e-3)

    def step(size: int) -> None:
        opt.zero_grad()
        F.cross_entropy(model(x[:size]), y[:size]).backward()
        opt.step()

    return st.structure.step_overhead(step)


def sampler(sizes: int | Following, seed: int, x: Tensor, y: Tensor) -> st.structure.Batches:
    """Of a fixed size, or one that follows the noise scale."""
    if isinstance(sizes, int):
        return st.structure.Batches(range(TRAIN), sizes, sizes, seed=seed)
    return st.structure.Batches(
        range(TRAIN), sizes.start, max(FIXED), least=16 if sizes.timed else None,
        scale=st.structure.NoiseScale(memory=20),
        overhead=overhead(x, y) if sizes.timed else None, seed=seed,
    )  # fmt: skip


def run(seed: int, sizes: int | Following, target: float) -> tuple[float, float, int]:
    """Examples and seconds to the target, and the last size of batches."""
    x, y = images(seed)
    torch.manual_seed(seed)
    model = network()
    opt = st.AdamW(model, lr=1e-3, weight_decay=0.01)
    examples, evaluated, begun = 0, 0, time.perf_counter()
    batches = sampler(sizes, seed, x, y)

    def closure() -> Tensor:
        at = TRAIN + torch.randint(VAL, (128,))
        return F.cross_entropy(model(x[at]), y[at])

    while examples < MOST:
        for number, pick in enumerate(batches):
            opt.zero_grad()
            measured = isinstance(sizes, Following) and not opt.sweeping
            if measured and number % EVERY == 0 and len(pick) % 2 == 0:
                for half in (pick[::2], pick[1::2]):
                    (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
                    batches.scale.micro_batch(model.parameters())
                batches.scale.whole_batch(len(pick))
            else:
                F.cross_entropy(model(x[pick]), y[pick]).backward()
            opt.step()
            opt.hyper_step(closure)
            examples += len(pick)
            if examples - evaluated >= BETWEEN:
                evaluated = examples
                with opt.averaged(), torch.no_grad():
                    loss = float(F.cross_entropy(model(x[TRAIN:]), y[TRAIN:]))
                if loss <= target:
                    return examples, time.perf_counter() - begun, batches.size
    return math.inf, math.inf, batches.size


def run_tuner(seed: int, sizes: int | Following, target: float) -> tuple[float, float, int]:
    """The same with ``st.Tuner``."""
    x, y = images(seed)
    torch.manual_seed(seed)
    tuner = st.Tuner(
        network(), F.cross_entropy, hparams={"lr": 1e-3, "weight_decay": 0.01}, compile=False,
        schedule="constant",
    )  # fmt: skip
    begun = time.perf_counter()
    batches = sampler(sizes, seed, x, y)
    examples, evaluated, reached = 0, 0, math.inf

    def counted(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal examples
        examples += len(batch[1])
        return batch

    def ends(progress: st.Progress) -> bool:
        nonlocal evaluated, reached
        if examples - evaluated >= BETWEEN:
            evaluated = examples
            reached = examples if progress.scores["loss"] <= target else math.inf
        return reached < math.inf or examples >= MOST

    data = TensorDataset(x[:TRAIN], y[:TRAIN])
    followed = isinstance(sizes, Following)
    fixed = BatchSampler(RandomSampler(range(TRAIN)), batches.size, drop_last=False)
    train = DataLoader(
        data, batch_size=None, sampler=batches if followed else fixed, collate_fn=counted
    )
    val = DataLoader(
        TensorDataset(x[TRAIN:], y[TRAIN:]), batch_size=None,
        sampler=BatchSampler(RandomSampler(range(VAL)), 128, drop_last=False),
    )  # fmt: skip
    most = max(FIXED) if followed else batches.size
    tuner.fit(
        train, val, steps=MOST // batches.size, evaluate_every=max(1, BETWEEN // most),
        callbacks=[ends], progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    return reached, seconds if reached < math.inf else math.inf, batches.size


def ratio(found: Sequence[float], best: Sequence[float]) -> str:
    """Geometric mean of the ratios of pairs, and its standard error."""
    if math.inf in found:
        return f"{found.count(math.inf)} of {len(found)} did not reach it"
    logs = [math.log(a / b) for a, b in zip(found, best, strict=True)]
    mean = math.exp(statistics.mean(logs))
    error = mean * statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
    return f"{mean:.2f} ± {error:.2f}"


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--target", type=float, default=0.37)
    parser.add_argument("--driver", default="optimizer", choices=("optimizer", "tuner"))
    args = parser.parse_args()
    go = run_tuner if args.driver == "tuner" else run
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    rows = {n: s for n, s in ROWS.items() if go is run or isinstance(s, int) or not s.timed}
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in rows}
    for seed in range(args.seeds):
        for name, sizes in rows.items():
            found[name].append(go(seed, sizes, args.target))
    columns = {
        name: ([f[0] for f in runs], [f[1] for f in runs], [f[2] for f in runs])
        for name, runs in found.items()
    }
    best = [
        min((columns[str(s)][i] for s in FIXED), key=lambda c: sum(map(math.log, c)))
        for i in (0, 1)
    ]
    print("| batch | examples to the target | ÷ best fixed | seconds | ÷ best fixed | last size |")
    print("|---|---|---|---|---|---|")
    for name, (examples, seconds, last) in columns.items():
        print(
            f"| {name} | {statistics.mean(examples):,.0f} | {ratio(examples, best[0])} | "
            f"{statistics.mean(seconds):.2f} | {ratio(seconds, best[1])} | "
            f"{statistics.mean(last):.0f} |"
        )


if __name__ == "__main__":
    main()
