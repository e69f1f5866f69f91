"""Throughput of a tuner on two ranks against one process, one thread each.

    python -m benchmarks.cost.parallel [--rounds 5] [--batch-size 128] [--ranks 2] [--compile]

The small CNN of :mod:`benchmarks.cost.nets` on images of 28×28, AdamW, four hyperparameters tuned,
gloo. Twice: with the same batches as the one process, of which each rank takes its part, so that
both take the same steps; and with as many images a rank as the one process takes. The other ranks
wait, without using their core, while the first one trains alone; rounds are interleaved.

Needs as many free cores as ranks: on busy ones the ratio says nothing. Output::

    | images a step: alone, together | one process, images/s | 2 ranks | ratio (quartiles) |
    |---|---|---|---|
    | 128, 128 | … | … | … |
    | 128, 256 | … | … | … |
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

import selftune as st
from benchmarks.cost.nets import Batch
from benchmarks.workloads import small_cnn

WARM = 0.2
"""Share of the steps that is left out at the start."""


def images(batch: int, count: int = 8) -> list[Batch]:
    """Batches of noise."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, 1, 28, 28, generator=generator),
            torch.randint(10, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def throughput(parallel: str | None, batch: int, steps: int, compile_step: bool) -> float:
    """Images a second of all ranks together, timed between the batches that a run takes."""
    torch.manual_seed(0)
    data = images(batch)
    seen: list[float] = []

    def batches() -> Iterator[Any]:
        for each in itertools.cycle(data[:-2]):
            seen.append(time.perf_counter())
            yield each

    tuner = st.Tuner(
        small_cnn(), F.cross_entropy, parallel=parallel, compile=compile_step, probe=False,
        guard=False,
    )  # fmt: skip
    tuner.fit(batches(), data[-2:], steps=steps, evaluate_every=steps, progress=False)
    first = int(WARM * steps)
    return batch * (len(seen) - 1 - first) / (seen[-1] - seen[first])


def rank(number: int, args: argparse.Namespace, port: int) -> None:
    """One of the processes; the first one prints the table."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    os.environ.update(
        RANK=str(number), WORLD_SIZE=str(args.ranks), MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )  # fmt: skip
    dist.init_process_group("gloo")
    if number == 0:
        print(
            f"| images a step: alone, together | one process, images/s | {args.ranks} ranks | "
            "ratio (quartiles) |\n|---|---|---|---|"
        )
    for together in (args.batch_size, args.batch_size * args.ranks):
        pairs = []
        for _ in range(args.rounds):
            alone = 0.0
            if number == 0:
                alone = throughput(None, args.batch_size, args.steps, args.compile)
            dist.barrier()
            pairs.append((alone, throughput("ddp", together, args.steps, args.compile)))
            dist.barrier()
        if number == 0:
            one, many = (statistics.median(side) for side in zip(*pairs, strict=True))
            low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            print(
                f"| {args.batch_size}, {together} | {one:.0f} | {many:.0f} | "
                f"{middle:.2f} ({low:.2f}…{high:.2f}) |",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="of the one process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, (args, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
