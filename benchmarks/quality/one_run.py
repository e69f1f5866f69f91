"""One self-tuned run against a pool of random-search runs.

Baseline: 100 plain torch runs with random hyperparameters (``benchmarks.quality.random_search``),
evaluated at the same running average. Ours: one self-tuned run from ordinary defaults (median
of 5 seeds), and one from each of 10 random starts drawn from the pool's own ranges. Probe and
hyper steps count as training steps. Rank: the share of the pool that is better.

    SELFTUNE_DATA=... python -m benchmarks.quality.one_run

Typical output is kept in ``docs/benchmarks-selection.md``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import selftune as st
from benchmarks.quality.random_search import SPACES, Start, draw, pool
from benchmarks.workloads import WORKLOADS, Workload

DEFAULTS = {
    "SGD": Start(lr=0.01, momentum=0.9, weight_decay=1e-4, decay=0.0),
    "AdamW": Start(lr=1e-3, momentum=0.9, weight_decay=1e-2, decay=0.0),
}
FIRST_RANDOM_START = 500  # seeds of starts that the pool does not hold


@dataclass(frozen=True)
class Outcome:
    """Losses at the averaged weights at the end of a run."""

    val: float
    test: float


def run_self_tuned(
    workload: Workload, optimizer: str, start: Start, seed: int, every: int = 5, **tuning
) -> Outcome:
    """One self-tuned run; validation batches come from the validation split."""
    model = workload.model(seed)
    opt = start.make(
        st, optimizer, model.parameters(), total_steps=workload.steps, every=every, **tuning
    )
    validation = workload.batches("val", seed + 777)
    for _, batch in zip(range(workload.steps), workload.batches("train", seed), strict=False):
        opt.zero_grad()
        workload.loss(model, batch).backward()
        opt.step()
        opt.hyper_step(lambda: workload.loss(model, next(validation)))
    with opt.averaged():
        return Outcome(*(workload.evaluate(model, split) for split in ("val", "test")))


def rank(loss: float, runs: list[dict[str, float]]) -> float:
    """The percentage of the pool with a lower validation loss."""
    if not math.isfinite(loss):
        return 100.0
    return 100 * sum(run["val"] < loss for run in runs) / len(runs)


def report(name: str, optimizer: str, args: argparse.Namespace) -> None:
    """Run and print one row of each table."""
    runs = pool(name, optimizer, args.pool, args.folder)
    best = min(runs, key=lambda run: run["val"])
    workload = WORKLOADS[name]()
    ours = [
        run_self_tuned(workload, optimizer, DEFAULTS[optimizer], seed) for seed in range(args.seeds)
    ]
    ranks = sorted(rank(o.val, runs) for o in ours)
    val, test = (sorted(getattr(o, split) for o in ours) for split in ("val", "test"))
    print(
        f"| {name} | {optimizer} | {best['val']:.3f} / {best['test']:.3f} "
        f"| {statistics.median(val):.3f} ({val[0]:.3f}…{val[-1]:.3f}) "
        f"| {statistics.median(test):.3f} ({test[0]:.3f}…{test[-1]:.3f}) "
        f"| {statistics.median(ranks):.0f} ({ranks[0]:.0f}…{ranks[-1]:.0f}) ",
        end="",
        flush=True,
    )
    seeds = range(FIRST_RANDOM_START, FIRST_RANDOM_START + args.starts)
    random = [
        run_self_tuned(workload, optimizer, draw(optimizer, seed), seed % 100) for seed in seeds
    ]
    ranks = sorted(rank(o.val, runs) for o in random)
    failed = sum(not math.isfinite(o.val) for o in random)
    print(f"| {statistics.median(ranks):.0f} | {ranks[-1]:.0f} | {failed} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=100, help="random-search runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=10, help="random starts")
    parser.add_argument("--only", default="", choices=("", *WORKLOADS, *SPACES))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| workload | optimizer | pool's best, val / test | ours, val | ours, test | rank in % "
        "| random starts, median rank | worst | not finite |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in WORKLOADS:
        for optimizer in SPACES:
            if args.only in ("", name, optimizer):
                report(name, optimizer, args)


if __name__ == "__main__":
    main()
