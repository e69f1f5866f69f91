"""Learning-rate sweeps in short runs: what they buy, and where they cost.

    SELFTUNE_DATA=... python -m benchmarks.quality.short_runs [--driver tuner] [--seeds 2]

Each run is one of AdamW, SGD (momentum 0.9), RMSprop or Lion on a workload of the suite, through
``st.AdamW`` and its like or through ``st.Tuner``, from the usual learning rate (1e-3, 1e-2, 1e-3,
1e-4), a hundredth of it, and thirty times it. Printed is the geometric mean, over workloads, rules
and seeds, of the test loss with a sweep over the test loss without one; in brackets the same
without interpolation between the rates of the sweep. Six minutes on one core; the table is kept in
``docs/ablations-details.md``.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import selftune as st
from benchmarks.proof.drivers import Shuffled
from benchmarks.proof.rendering import grid
from benchmarks.workloads import SUITE, Workload
from selftune.control import SweepSettings

NAMES = ("digits", "few-digits", "autoencoder", "concrete", "yacht")
STEPS = (20, 30, 60, 120, 250)
RULES: dict[str, tuple[Callable[..., Any], float]] = {
    "AdamW": (st.AdamW, 1e-3), "SGD": (partial(st.SGD, momentum=0.9), 1e-2),
    "RMSprop": (st.RMSprop, 1e-3), "Lion": (st.Lion, 1e-4),
}  # fmt: skip
STARTS = {"a hundredth": 1e-2, "usual": 1.0, "thirtyfold": 30.0}
SWEEPS: dict[str, Any] = {"none": False, "full": True, "grid": SweepSettings(interpolation=0.0)}


def optimized(workload: Workload, rule: str, lr: float, steps: int, probe: Any, seed: int) -> float:
    """The test loss of a run of an optimizer."""
    model = workload.model(seed)
    train, val = workload.batches("train", seed), workload.batches("val", seed, 2)
    opt = RULES[rule][0](model, lr=lr, total_steps=steps, probe=probe)
    for _ in range(steps):
        opt.zero_grad()
        workload.loss(model, next(train)).backward()
        opt.step()
        opt.hyper_step(lambda: workload.loss(model, next(val)))
    with opt.averaged():
        return workload.evaluate(model, "test")


def tuned(workload: Workload, rule: str, lr: float, steps: int, probe: Any, seed: int) -> float:
    """The test loss of a run of the tuner."""
    model = workload.model(seed)
    start = {"lr": lr, **({"momentum": 0.9} if rule == "SGD" else {})}
    tuner = st.Tuner(
        model, workload.criterion, rule=getattr(st.rules, rule)(), hparams=start, compile=False,
        probe=probe, seed=seed,
    )  # fmt: skip
    train, val = Shuffled(workload, "train", seed), Shuffled(workload, "val", seed, 2)
    tuner.fit(train, val, steps=steps, evaluate_every=steps, progress=False)
    return workload.evaluate(model, "test")


DRIVERS = {"optimizer": optimized, "tuner": tuned}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=DRIVERS, default="optimizer")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    workloads = [SUITE[name]() for name in NAMES]
    rows = []
    for rule, (label, start) in product(RULES, STARTS.items()):
        row = [rule, label]
        for steps in STEPS:
            logs: dict[str, list[float]] = {name: [] for name in SWEEPS}
            for w, seed, (name, probe) in product(workloads, range(args.seeds), SWEEPS.items()):
                lr = start * RULES[rule][1]
                found = DRIVERS[args.driver](w, rule, lr, steps, probe, seed)
                logs[name].append(math.log(found) if math.isfinite(found) else math.log(1e3))
            none, full, coarse = map(statistics.fmean, logs.values())
            row.append(f"{math.exp(full - none):.2f} ({math.exp(coarse - none):.2f})")
        rows.append(row)
    print(grid(["optimizer", "start", *(f"{steps} steps" for steps in STEPS)], rows))


if __name__ == "__main__":
    main()
