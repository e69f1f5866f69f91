"""What the shortcuts of the fused loop cost in quality: one exact part put back at a time.

The tuner keeps responses in bfloat16, observes and averages one step of five, and takes the
responses to learning rate and weight decay from closed forms. Each line undoes one of these on
the jobs of ``one_run``, the last all; the first is the drop-in optimizer. Printed are validation
and test loss, means over the seeds with standard error.

    SELFTUNE_DATA=... python -m benchmarks.quality.fused_quality [--seeds 10] [--only digits]

Typical output is kept in ``docs/benchmarks-cost.md``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterator
from typing import Any

import torch

import selftune as st
from benchmarks.quality.one_run import DEFAULTS, Outcome, run_self_tuned
from benchmarks.workloads import WORKLOADS, Batch, Workload

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "sensitivities in float32": {"tangents": None},
    "every step tracked and averaged": {"estimator": st.Trace(stride=1)},
    "no closed forms": {"estimator": st.Trace(stride=5, closed_forms=False)},
    "all three": {"tangents": None, "estimator": st.Trace(stride=1, closed_forms=False)},
    "one step of ten, every 10": {"every": 10},
}


class Shuffled:
    """Batches of a workload's split in a new order each time."""

    def __init__(self, workload: Workload, split: str, seed: int) -> None:
        self.data, self.size = workload.splits[split], workload.batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data[0]) // self.size

    def __iter__(self) -> Iterator[Batch]:
        inputs, targets = self.data
        order = torch.randperm(len(inputs), generator=self.generator)
        for index in order[: len(self) * self.size].split(self.size):
            yield inputs[index], targets[index]


def run(workload: Workload, optimizer: str, seed: int, **options: Any) -> Outcome:
    """One run of a tuner."""
    start = DEFAULTS[optimizer]
    momentum = "momentum" if optimizer == "SGD" else "beta1"
    model = workload.model(seed)
    tuner = st.Tuner(
        model, torch.nn.functional.cross_entropy, rule=getattr(st.rules, optimizer)(),
        hparams={"lr": start.lr, momentum: start.momentum, "weight_decay": start.weight_decay},
        compile=False, **options,
    )  # fmt: skip
    tuner.fit(
        Shuffled(workload, "train", seed), Shuffled(workload, "val", seed + 777),
        steps=workload.steps, evaluate_every=workload.steps, progress=False,
    )  # fmt: skip
    return Outcome(*(workload.evaluate(model, split) for split in ("val", "test")))


def show(label: str, name: str, optimizer: str, found: list[Outcome]) -> None:
    """One line of the table."""
    cells = []
    for split in ("val", "test"):
        losses = [getattr(outcome, split) for outcome in found]
        error = statistics.stdev(losses) / len(losses) ** 0.5
        cells.append(f"{statistics.mean(losses):.3f} ± {error:.3f}")
    print(f"| {name} | {optimizer} | {label} | {cells[0]} | {cells[1]} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", default="", choices=("", *WORKLOADS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    print("| workload | optimizer | change | val | test |\n|---|---|---|---|---|")
    for name in [n for n in WORKLOADS if args.only in ("", n)]:
        workload = WORKLOADS[name]()
        for optimizer in DEFAULTS:
            dropped_in = [
                run_self_tuned(workload, optimizer, DEFAULTS[optimizer], seed)
                for seed in range(args.seeds)
            ]
            show("drop-in optimizer", name, optimizer, dropped_in)
            for label, options in VARIANTS.items():
                found = [run(workload, optimizer, s, **options) for s in range(args.seeds)]
                show(label, name, optimizer, found)


if __name__ == "__main__":
    main()
