"""Wall time of a self-tuned run against a plain one with default hyperparameters, both eager.

    SELFTUNE_DATA=... python -m benchmarks.wall [--only energy,fashion-cnn] [--rounds 12]

Plain: ``torch.optim.AdamW`` in the loop of ``benchmarks.run``. Ours: the configuration of the
proof, its validation passes included. Blocks of forty steps alternate in one run after the probe;
printed are medians in milliseconds a step, their ratio and its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.proof.contenders import METHODS
from benchmarks.workloads import SUITE, Workload


def stepper(workload: Workload, method: str) -> Callable[[int], float]:
    """A function that takes a number of steps and tells the milliseconds of one."""
    model = workload.model(0)
    contender = METHODS[method](workload, model, 0)
    batches = workload.batches("train", 0)

    def steps(count: int) -> float:
        taken = [next(batches) for _ in range(count)]
        begun = time.perf_counter()
        for batch in taken:
            contender.step(batch)
        return 1e3 * (time.perf_counter() - begun) / count

    return steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SUITE), help="workloads, by commas")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| workload | plain, ms a step | ours, ms a step | ratio (quartiles) |")
    print("|---|---|---|---|")
    found = []
    for name in args.only.split(","):
        workload = SUITE[name]()
        plain, ours = (stepper(workload, m) for m in ("default", "selftune"))
        ours(120), plain(20)  # past the probe, and warm
        pairs = [(plain(40), ours(40)) for _ in range(args.rounds)]
        ratios = [b / a for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found.append(middle)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {a:.2f} | {b:.2f} | {middle:.2f} ({low:.2f}…{high:.2f}) |", flush=True)
    print(f"| median | | | {statistics.median(found):.2f} |")


if __name__ == "__main__":
    main()
