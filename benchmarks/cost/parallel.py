"""Throughput of a tuner on two ranks against one process, one thread each.

    python -m benchmarks.cost.parallel [--rounds 5] [--batch-size 128] [--ranks 2] [--compile]

The small CNN of :mod:`benchmarks.cost.nets` on images of 28×28, AdamW, four hyperparameters tuned,
gloo. With the same batches as the one process, of which each rank takes its part, so that both
take the same steps; and with as many images a rank as the one process takes. For comparison: as
many processes that train each on its own and know nothing of one another, which is what the
machine gives at most; and a plain loop in torch's ``DistributedDataParallel`` against a plain loop
alone. The other ranks wait, without using their core, while the first one trains alone; rounds are
interleaved.

Needs as many free cores as ranks: on busy ones the ratio says nothing. Output::

    | images a step: alone, together | one process, images/s | 2 ranks | ratio (quartiles) |
    |---|---|---|---|
    | 128, 128 | … | … | … |
    | 128, 256 | … | … | … |
    | 128, 2 × 128 apart | … | … | … |
    | 128, 256, plain loops in torch's DistributedDataParallel | … | … | … |
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
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


def plain(parallel: bool, batch: int, steps: int) -> float:
    """Images a second of a plain loop, on this rank alone or on all in torch's own container."""
    torch.manual_seed(0)
    model: torch.nn.Module = small_cnn()
    if parallel:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = itertools.cycle(images(batch // dist.get_world_size() if parallel else batch))
    for _ in range(int(WARM * steps)):
        _plain_step(model, optimizer, *next(batches))
    start = time.perf_counter()
    for _ in range(steps):
        _plain_step(model, optimizer, *next(batches))
    return batch * steps / (time.perf_counter() - start)


def _plain_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def apart(batch: int, args: argparse.Namespace) -> float:
    """Images a second of all ranks, each of which trains on its own at the same time."""
    total = torch.tensor(throughput(None, batch, args.steps, args.compile))
    dist.all_reduce(total)
    return float(total)


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
    single, union = args.batch_size, args.batch_size * args.ranks

    def tuned(parallel: str | None, batch: int) -> Callable[[], float]:
        return lambda: throughput(parallel, batch, args.steps, args.compile)

    ways: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        f"{single}, {single}": (tuned(None, single), tuned("ddp", single)),
        f"{single}, {union}": (tuned(None, single), tuned("ddp", union)),
        f"{single}, {args.ranks} × {single} apart": (
            tuned(None, single),
            lambda: apart(single, args),
        ),
        f"{single}, {union}, plain loops in torch's DistributedDataParallel": (
            lambda: plain(False, single, args.steps),
            lambda: plain(True, union, args.steps),
        ),
    }
    for name, (by_one, by_all) in ways.items():
        pairs = []
        for _ in range(args.rounds):
            alone = by_one() if number == 0 else 0.0
            dist.barrier()
            pairs.append((alone, by_all()))
            dist.barrier()
        if number == 0:
            one, many = (statistics.median(side) for side in zip(*pairs, strict=True))
            low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            print(
                f"| {name} | {one:.0f} | {many:.0f} | {middle:.2f} ({low:.2f}…{high:.2f}) |",
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
