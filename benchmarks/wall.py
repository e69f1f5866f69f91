"""Wall time of a self-tuned run against a plain one with default hyperparameters, both eager.

    SELFTUNE_DATA=... python -m benchmarks.wall [--only energy,fashion-cnn] [--rounds 12]

Plain: ``torch.optim.AdamW`` in the loop of ``benchmarks.run``, as torch makes it and with
``fused=True``. Ours: the configuration of the proof, its validation passes included. Blocks of
forty steps alternate in one run, from the probe to its end at most, in three processes, one
after the other: where tensors come to lie in memory is luck that lasts as long as a process.
Printed are medians in milliseconds a step, the ratio of ours to plain with its quartiles, and to
fused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import nn

from benchmarks.proof.contenders import METHODS, Stepping
from benchmarks.proof.training import Make
from benchmarks.workloads import SUITE, Workload


def fused(workload: Workload, model: nn.Module, seed: int) -> Stepping:
    """The default with torch's fused kernels."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Stepping(workload, model, optimizer, factor=lambda step: 1.0)


def stepper(workload: Workload, make: Make) -> Callable[[int], float]:
    """A function that takes a number of steps and tells the milliseconds of one."""
    model = workload.model(0)
    contender = make(workload, model, 0)
    batches = workload.batches("train", 0)

    def steps(count: int) -> float:
        taken = [next(batches) for _ in range(count)]
        begun = time.perf_counter()
        for batch in taken:
            contender.step(batch)
        return 1e3 * (time.perf_counter() - begun) / count

    return steps


def rounds(name: str, count: int) -> list[tuple[float, float, float]]:
    """Milliseconds of a step of plain, fused and ours, in blocks that alternate."""
    torch.set_num_threads(1)
    workload = SUITE[name]()
    loops = [stepper(workload, m) for m in (METHODS["default"], fused, METHODS["selftune"])]
    for loop in loops:
        loop(120)  # past the probe, and warm
    # Past its end a run is not what it costs.
    plain, other, ours = loops
    return [
        (plain(40), other(40), ours(40)) for _ in range(min(count, (workload.steps - 120) // 40))
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SUITE), help="workloads, by commas")
    parser.add_argument("--rounds", type=int, default=12, help="of each process, at most")
    parser.add_argument("--processes", type=int, default=3)
    args = parser.parse_args()
    print("| workload | plain, ms a step | fused | ours | ours / plain (quartiles) | / fused |")
    print("|---|---|---|---|---|---|")
    found = []
    for name in args.only.split(","):
        taken = []
        for _ in range(args.processes):
            fresh = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=fresh) as process:
                taken += process.submit(rounds, name, args.rounds).result()
        low, middle, high = statistics.quantiles([c / a for a, _, c in taken], n=4)
        other = statistics.median(c / b for _, b, c in taken)
        found.append((middle, other))
        times = [f"{statistics.median(column):.2f}" for column in zip(*taken, strict=True)]
        cells = [name, *times, f"{middle:.2f} ({low:.2f}…{high:.2f})", f"{other:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    middle, other = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"| median | | | | {middle:.2f} | {other:.2f} |")


if __name__ == "__main__":
    main()
