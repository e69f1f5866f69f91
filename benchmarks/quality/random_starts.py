"""Learning rates that start anywhere within six decades, through both drivers.

    SELFTUNE_DATA=... python -m benchmarks.quality.random_starts [--only digits,energy]
        [--faces optimizer:AdamW,tuner:SGD] [--starts 10] [--workers 2]

Each workload is trained from the usual rate (three seeds) and from rates that are drawn
log-uniformly within three decades on either side of it, a seed each. Printed are, for each driver
and rule, the validation loss over the median from the usual rate: geometric mean, worst, and how
many are more than a tenth above it; and, where ``benchmarks.run`` has recorded 100 random
configurations of AdamW, the share of them with a lower loss (rank): median and worst. Four minutes
on two cores.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

from benchmarks.proof.drivers import STARTS, Run, work
from benchmarks.proof.rendering import grid
from benchmarks.proof.scoring import rank
from benchmarks.run import records

TABLES = "digits,few-digits,energy,concrete,yacht,power,wine_red"
FACES = "optimizer:AdamW,optimizer:SGD,tuner:AdamW,tuner:SGD"
USUAL = 3
"""Runs from the usual rate."""
Job = tuple[str, str, str, int, float]


def run(job: Job) -> Run:
    """One run: workload, driver, rule, seed and rate."""
    name, face, rule, seed, rate = job
    return work(name, face, rule, seed, start={"lr": rate})


def jobs(name: str, face: str, rule: str, count: int) -> list[Job]:
    """Runs from the usual rate, then from random ones."""
    draw, usual = random.Random(f"{name} {face}:{rule}"), STARTS[rule]["lr"]
    rates = [usual * 10 ** draw.uniform(-3, 3) for _ in range(count)]
    return [
        *((name, face, rule, seed, usual) for seed in range(USUAL)),
        *((name, face, rule, seed, rate) for seed, rate in enumerate(rates)),
    ]


def pools() -> dict[str, list[float]]:
    """By workload, losses of random configurations of AdamW, at the better of two points."""
    found = defaultdict(list)
    for record in records():
        if record.method == "random":
            found[record.workload].append(min(record.own["val"], record.average["val"]))
    return found


def main() -> None:
    """Print the table, and the starts whose loss is more than 1.3 times the usual one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=TABLES, help="workloads, by commas")
    parser.add_argument("--faces", default=FACES)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    faces = [face.split(":") for face in args.faces.split(",")]
    pool, logs, ranks = pools(), defaultdict(list), defaultdict(list)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as executor:
        for name in args.only.split(","):
            for face, rule in faces:
                planned = jobs(name, face, rule, args.starts)
                losses = [found.val for found in executor.map(run, planned)]
                usual = statistics.median(losses[:USUAL])
                for loss, job in zip(losses[USUAL:], planned[USUAL:], strict=True):
                    logs[face, rule].append(math.log(loss / usual))
                    if name in pool:
                        ranks[face, rule].append(rank(loss, pool[name]))
                    if not loss < 1.3 * usual:
                        ends = f"{loss:.4g} for {usual:.4g}"
                        print(f"{name}, {face}, {rule} from {job[-1]:.2g}: {ends}", flush=True)
    rows = [
        [
            face, rule, str(len(found)), f"{math.exp(statistics.fmean(found)):.3f}",
            f"{math.exp(max(found)):.2f}", str(sum(x > math.log(1.1) for x in found)),
            f"{statistics.median(ranks[face, rule]):.1f} %" if ranks[face, rule] else "–",
            f"{max(ranks[face, rule]):.0f} %" if ranks[face, rule] else "–",
        ]
        for (face, rule), found in logs.items()
    ]  # fmt: skip
    head = ["driver", "rule", "runs", "÷ usual start", "worst", "above 1.1", "rank", "worst rank"]
    print(grid(head, rows))


if __name__ == "__main__":
    main()
