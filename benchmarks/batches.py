"""Batches that follow the noise scale against fixed ones: examples and time to a validation loss.

An MLP on 10,000 images of Fashion-MNIST, `st.AdamW` with its rate tuned, until the loss of 2,000
other images at the averaged weights is below the target. Each gradient of an example counts once;
the noise scale's micro-batches are the halves of a batch.

    SELFTUNE_DATA=... python -m benchmarks.batches [--seeds 0 1 2] [--target 0.42]

Typical output (two cores that other programs used too, torch 2.13):

    | batch | examples to the target | ÷ best fixed | seconds | ÷ best fixed | last size |
    |---|---|---|---|---|---|
    | 16 | 17,333 ± 4,163 | 1.00 | 50.0 | 4.00 | 16 |
    | 32 | 21,477 ± 3,071 | 1.24 | 34.9 | 2.79 | 32 |
    | 64 | 29,243 ± 17,346 | 1.69 | 31.7 | 2.54 | 64 |
    | 128 | 25,296 ± 8,286 | 1.46 | 15.5 | 1.24 | 128 |
    | 256 | 38,965 ± 8,936 | 2.25 | 12.5 | 1.00 | 256 |
    | 512 | 62,299 ± 9,986 | 3.59 | 12.9 | 1.03 | 512 |
    | noise scale, from 16 | 16,725 ± 4,665 | 0.96 | 73.0 | 5.84 | 43 |
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

FIXED = (16, 32, 64, 128, 256, 512)
TRAIN, VAL, BETWEEN, MOST = 10_000, 2_000, 2_000, 400_000
"""Examples to train on, to tune on, between two evaluations, and at most."""


def images(seed: int) -> tuple[Tensor, Tensor]:
    """A random subset, standardised, flat."""
    file = np.load(Path(os.environ["SELFTUNE_DATA"]) / "fashion_mnist.npz")
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(file["x_train"]), generator=generator)[: TRAIN + VAL].numpy()
    x = (torch.from_numpy(file["x_train"][pick]).float() / 255 - 0.286) / 0.353
    return x.flatten(1), torch.from_numpy(file["y_train"][pick]).long()


def run(seed: int, size: int | None, target: float) -> tuple[float, float, int]:
    """Examples and seconds to the target, and the last size of batches; None: they follow."""
    x, y = images(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = st.AdamW(model, lr=1e-3, weight_decay=0.01)
    batches = st.structure.Batches(range(TRAIN), start=size or 16, most=size or 512)
    examples, evaluated, begun = 0, 0, time.perf_counter()

    def closure() -> Tensor:
        at = TRAIN + torch.randint(VAL, (128,))
        return F.cross_entropy(model(x[at]), y[at])

    while examples < MOST:
        for pick in batches:
            opt.zero_grad()
            if size is None and len(pick) % 2 == 0:
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
    return float("inf"), float("inf"), batches.size


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.42)
    args = parser.parse_args()
    rows: dict[str, tuple[float, float, float, float]] = {}
    for size in (*FIXED, None):
        name = "noise scale, from 16" if size is None else str(size)
        found = [run(seed, size, args.target) for seed in args.seeds]
        counts, seconds = [f[0] for f in found], [f[1] for f in found]
        spread = statistics.stdev(counts) if len(counts) > 1 else 0.0
        last = statistics.mean(f[2] for f in found)
        rows[name] = statistics.mean(counts), spread, statistics.mean(seconds), last
        print(name, rows[name], flush=True)
    best = [min(rows[str(size)][i] for size in FIXED) for i in (0, 2)]
    print(
        "\n| batch | examples to the target | ÷ best fixed | seconds | ÷ best fixed | last size |"
    )
    print("|---|---|---|---|---|---|")
    for name, (count, spread, seconds, last) in rows.items():
        print(
            f"| {name} | {count:,.0f} ± {spread:,.0f} | {count / best[0]:.2f} | {seconds:.1f} | "
            f"{seconds / best[1]:.2f} | {last:.0f} |"
        )


if __name__ == "__main__":
    main()
