"""No validation set: a held-out tenth that joins the training data, against a 10 % split.

    SELFTUNE_DATA=... python -m benchmarks.quality.no_validation [--seeds 4] [--rows "val=None" ...]
        [--workloads yacht digits ...] [--face optimizer]

The training and validation data of a workload are one training set here, of which a tenth is held
out at random. Baseline: a tuned run with this 10 % split. Printed is the test loss of other runs
divided by the baseline's from the same seed: median, quartiles and the largest over workloads and
seeds, the share of runs that are not worse, and the geometric mean of each workload. Rivals: other
times of the join and other shares, and a tenth that rotates every epoch, by the optimizer only. A
run takes 2 to 6 seconds; the table is kept in ``docs/ablations-details.md``.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import selftune as st
from benchmarks.proof.drivers import make_optimizer, make_tuner
from benchmarks.proof.rendering import grid
from benchmarks.workloads import SUITE, Workload

NAMES = ("yacht", "concrete", "energy", "wine_red", "digits", "few-digits", "noisy-fashion",
         "fashion-cnn")  # fmt: skip
SPLIT = "10 % split"
OURS: dict[str, dict[str, float]] = {
    "val=None": {},
    "until 40 %": {"until": 0.4},
    "until 80 %": {"until": 0.8},
    "a fifth": {"share": 0.2},
    "a fifth, until 50 %": {"share": 0.2, "until": 0.5},
}
"""Arguments of ``st.HoldOut``, by row."""
ROTATING = "rotating tenth"


class Rows(TensorDataset):
    """A data set that is read a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """The batch of some examples."""
        return [t[indices] for t in self.tensors]


def loader_of(workload: Workload) -> DataLoader[Any]:
    """All data but the test set."""
    parts = zip(workload.splits["train"], workload.splits["val"], strict=True)
    data = Rows(*(torch.cat(both) for both in parts))
    return DataLoader(data, batch_size=workload.batch_size, shuffle=True, collate_fn=tuple)


def endless(data: Any, size: int) -> Iterator[Any]:
    """Shuffled batches, epoch after epoch."""
    while True:
        size = min(size, len(data))
        yield from DataLoader(data, size, shuffle=True, drop_last=True, collate_fn=tuple)


def by_tuner(workload: Workload, rule: str, seed: int, row: str) -> nn.Module:
    """One run of ``st.Tuner``."""
    model = workload.model(seed)
    tuner = make_tuner(workload, model, rule, seed=seed)
    val = 0.1 if row == SPLIT else st.HoldOut(**OURS[row])
    tuner.fit(
        loader_of(workload), val, steps=workload.steps, evaluate_every=workload.steps,
        progress=False,
    )  # fmt: skip
    return model


def by_optimizer(workload: Workload, rule: str, seed: int, row: str) -> nn.Module:
    """One run of ``st.AdamW`` or ``st.SGD``, which leaves its averaged weights in the model."""
    model = workload.model(seed)
    opt = make_optimizer(workload, model, rule)
    data = st.HoldOut(**OURS.get(row, {})).over(loader_of(workload), workload.steps, seed=seed)
    held: Iterator[Any] = data.val
    batches: Iterator[Any] = iter(data)
    if row == SPLIT:
        batches, held = _split(workload, data.held)
    elif row == ROTATING:
        batches, held = _rotating(workload, seed)
    for batch in islice(batches, workload.steps):
        opt.zero_grad()
        workload.loss(model, batch).backward()
        opt.step()
        if row not in OURS or data.holding:
            opt.hyper_step(lambda: workload.loss(model, next(held)))
    opt.eval()
    return model


def _split(workload: Workload, held: list[int]) -> tuple[Iterator[Any], Iterator[Any]]:
    """Batches of a split that stays."""
    data = loader_of(workload).dataset
    out = set(held)
    rest = [i for i in range(len(data)) if i not in out]  # type: ignore[arg-type]
    size = workload.batch_size
    return endless(Subset(data, rest), size), endless(Subset(data, held), 2 * size)


def _rotating(workload: Workload, seed: int) -> tuple[Iterator[Any], Iterator[Any]]:
    """Batches where another tenth validates in every epoch."""
    loader, size = loader_of(workload), workload.batch_size
    count = len(loader.dataset)  # type: ignore[arg-type]
    tenths = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).chunk(10)
    now = [0]

    def train() -> Iterator[Any]:
        while True:
            rest = torch.cat([t for i, t in enumerate(tenths) if i != now[0] % 10])
            data = Subset(loader.dataset, rest.tolist())
            yield from DataLoader(data, size, shuffle=True, collate_fn=tuple)
            now[0] += 1

    def val() -> Iterator[Any]:
        while True:
            yield next(endless(Subset(loader.dataset, tenths[now[0] % 10].tolist()), 2 * size))

    return train(), val()


FACES: dict[str, Callable[..., nn.Module]] = {"optimizer": by_optimizer, "tuner": by_tuner}


def loss(workload: Workload, face: str, rule: str, seed: int, row: str) -> float:
    """The test loss of one run; 1,000 if it is not finite."""
    found = workload.evaluate(FACES[face](workload, rule, seed, row), "test")
    return found if math.isfinite(found) else 1e3


def summary(ratios: dict[str, list[float]]) -> list[str]:
    """The cells of a row, from ratios by workload."""
    every = [r for found in ratios.values() for r in found]
    low, middle, high = statistics.quantiles(every, n=4) if len(every) > 1 else every * 3
    cells = [f"{middle:.3f}", f"{low:.2f} to {high:.2f}", f"{max(every):.2f}"]
    cells.append(f"{100 * sum(r <= 1 for r in every) / len(every):.0f} %")
    return cells + [f"{math.exp(statistics.fmean(map(math.log, f))):.3f}" for f in ratios.values()]


def main() -> None:
    """Print the table."""
    rows = (*OURS, ROTATING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rows", nargs="+", choices=rows, default=["val=None"])
    parser.add_argument("--workloads", nargs="+", choices=list(SUITE), default=list(NAMES))
    parser.add_argument("--face", choices=list(FACES), default="optimizer")
    parser.add_argument("--rule", choices=["AdamW", "SGD"], default="AdamW")
    args = parser.parse_args()
    if args.face == "tuner" and ROTATING in args.rows:
        parser.error(f"--rows {ROTATING!r} needs --face optimizer")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    ratios: dict[str, dict[str, list[float]]] = {row: {} for row in args.rows}
    for name in args.workloads:
        run = partial(loss, SUITE[name](), args.face, args.rule)
        for seed in range(args.seeds):
            base = run(seed, SPLIT)
            for row, found in ratios.items():
                found.setdefault(name, []).append(run(seed, row) / base)
        print(name, {row: [round(r, 3) for r in f[name]] for row, f in ratios.items()},
              file=sys.stderr, flush=True)  # fmt: skip
    head = [f"{args.face}, {args.rule}", "median", "quartiles", "largest", "not worse"]
    print(grid([*head, *args.workloads], [[r, *summary(f)] for r, f in ratios.items()]))


if __name__ == "__main__":
    main()
