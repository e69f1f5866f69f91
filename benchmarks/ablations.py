"""What each part of the method buys: one change at a time, on the jobs of ``one_run``.

    SELFTUNE_DATA=... python -m benchmarks.ablations

Prints the validation loss (median of seeds) and, in brackets, its rank in the pool in percent.
The table is kept in ``docs/ablations.md``, changes that lost included.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

import selftune as st
from benchmarks.one_run import DEFAULTS, rank, run_self_tuned
from benchmarks.random_search import SPACES, pool
from benchmarks.workloads import WORKLOADS
from selftune import tuning
from selftune.optim._block import Block

Change = tuple[dict, Callable[[], AbstractContextManager]]


def adam(size: float) -> Callable:
    """The default hyper optimizer with another step size."""
    return lambda raw: torch.optim.Adam(raw, lr=size, betas=(0.8, 0.98))


def plain_signal() -> AbstractContextManager:
    """Regularizers on the plain hypergradient, without the gap."""
    return patch.object(Block, "training_pull", lambda block: torch.zeros_like(block.pull))


def no_floor() -> AbstractContextManager:
    """Weight decay free to fall."""
    return patch.object(tuning, "NEGLIGIBLE", 1e-12)


def equal_pace() -> AbstractContextManager:
    """The same step size for every hyperparameter."""
    return patch.object(tuning, "PACE", {})


CHANGES: dict[str, Change] = {
    "default": ({}, nullcontext),
    "fixed hyperparameters, same schedule and average": ({"tune": (), "guard": False}, nullcontext),
    "outer loss at the last iterate, not the average": ({"average": st.Average(0.0)}, nullcontext),
    "γ = 0 (OneStep)": ({"estimator": st.OneStep()}, nullcontext),
    "γ = 0.97": ({"estimator": st.Trace(0.97)}, nullcontext),
    "plain hypergradient for weight decay, no gap": ({}, plain_signal),
    "no floor under weight decay": ({}, no_floor),
    "one pace for all hyperparameters": ({}, equal_pace),
    "hyper step 0.1": ({"hyper_optimizer": adam(0.1)}, nullcontext),
    "hyper step 0.02": ({"hyper_optimizer": adam(0.02)}, nullcontext),
    "every 10": ({"every": 10}, nullcontext),
    "no probe": ({"probe": False}, nullcontext),
    "no guard": ({"guard": False}, nullcontext),
    "constant schedule": ({"schedule": "constant"}, nullcontext),
    "lr only": ({"tune": ("lr",)}, nullcontext),
    "lr and weight decay": ({"tune": ("lr", "weight_decay")}, nullcontext),
    "decay α tuned too": ({"tune": None}, nullcontext),  # filled in below
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", default="", help="one change by name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    jobs = [(name, optimizer) for name in WORKLOADS for optimizer in SPACES]
    print("| change |", " | ".join(f"{n}, {o}" for n, o in jobs), "|")
    print("|---|" + "---|" * len(jobs))
    for label, (options, change) in CHANGES.items():
        if args.only not in ("", label):
            continue
        cells = []
        for name, optimizer in jobs:
            runs = pool(name, optimizer, 100, args.folder)
            extra = dict(options)
            if label == "decay α tuned too":
                momentum = "momentum" if optimizer == "SGD" else "beta1"
                extra["tune"] = ("lr", "decay", momentum, "weight_decay")
            with change():
                losses = [
                    run_self_tuned(
                        WORKLOADS[name](), optimizer, DEFAULTS[optimizer], seed, **extra
                    ).val
                    for seed in range(args.seeds)
                ]
            middle = statistics.median(losses)
            cells.append(f"{middle:.3f} ({rank(middle, runs):.0f})")
        print(f"| {label} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
