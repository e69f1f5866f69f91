"""What logging costs: a tuner's steps with a log directory against the same without.

    python -m benchmarks.cost.monitoring [--rounds 9]

Nets of :mod:`benchmarks.cost.nets`, four hyperparameters tuned, a hyperparameter step every five
steps, the default log interval. Runs are interleaved; medians of the time a step, with the
quartiles of the ratio. Evaluations and checkpoints, which a log directory brings too, are left to
the end.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

import selftune as st
from benchmarks.cost.nets import NETS, Net


def step_time(net: Net, steps: int, recorder: Any) -> float:
    """Seconds a step, compiled, between the batches a run takes; the first fifth is left out."""
    torch.manual_seed(0)
    seen: list[float] = []

    def batches() -> Iterator[Any]:
        for batch in itertools.cycle(net.batches[:-2]):
            seen.append(time.perf_counter())
            yield batch

    tuner = st.Tuner(net.make(), net.loss, compile=True, probe=False, guard=False)
    tuner.fit(
        batches(), net.batches[-2:], steps=steps, evaluate_every=steps, progress=False,
        recorder=recorder,
    )  # fmt: skip
    first = steps // 5
    return (seen[-1] - seen[first]) / (len(seen) - 1 - first)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="part of a net's name")
    args = parser.parse_args()
    nets = {name: make for name, make in NETS.items() if args.only in name}
    if not nets or args.rounds < 2:
        parser.error(f"use --rounds 2 or more, and a part of a name in {', '.join(NETS)}")
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    print(
        "| net | without, ms a step | with TensorBoard, ms | ratio (quartiles) |\n|---|---|---|---|"
    )
    for name, make in nets.items():
        net = make()
        steps = 10 * net.block
        pairs = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                without = step_time(net, steps, None)
                pairs.append((without, step_time(net, steps, st.monitor.TensorBoard(folder))))
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        a, b = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"| {name} | {a:.3f} | {b:.3f} | {middle:.3f} ({low:.3f}…{high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
