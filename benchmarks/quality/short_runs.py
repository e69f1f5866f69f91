"""Learning-rate sweeps in runs of less than 80 steps: what they buy, and where they cost.

    SELFTUNE_DATA=... python -m benchmarks.quality.short_runs [--seeds 3]

Each run is one of ``st.AdamW`` or ``st.SGD`` (momentum 0.9) on a workload of the suite, from
the usual learning rate (1e-3, 1e-2), a thousandth of it, and thirty times it. Printed is the
geometric mean, over workloads, rules and seeds, of the test loss with a sweep of 8 steps (and of 5)
over the test loss without one. Two minutes on one core; the table is kept in ``docs/ablations.md``.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from functools import partial
from itertools import product

import selftune as st
from benchmarks.proof.rendering import grid
from benchmarks.workloads import SUITE, Workload

NAMES = ("digits", "few-digits", "autoencoder", "concrete", "yacht")
STEPS = (20, 30, 40, 60, 79)
RULES = {"AdamW": (st.AdamW, 1e-3), "SGD": (partial(st.SGD, momentum=0.9), 1e-2)}
STARTS = {"a thousandth": 1e-3, "usual": 1.0, "thirtyfold": 30.0}


def loss(workload: Workload, rule: str, start: float, steps: int, probe: int, seed: int) -> float:
    """The test loss of one run; 1,000 where it is not finite."""
    make, rate = RULES[rule]
    model = workload.model(seed)
    train, val = workload.batches("train", seed), workload.batches("val", seed, 2)
    opt = make(model, lr=start * rate, total_steps=steps, probe=probe or False)
    for _ in range(steps):
        opt.zero_grad()
        workload.loss(model, next(train)).backward()
        opt.step()
        opt.hyper_step(lambda: workload.loss(model, next(val)))
    with opt.averaged():
        found = workload.evaluate(model, "test")
    return found if math.isfinite(found) else 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    logging.disable(logging.WARNING)
    workloads = [SUITE[name]() for name in NAMES]
    rows = []
    for (label, start), probe in product(STARTS.items(), (8, 5)):
        row = [label, f"{probe} steps"]
        for steps in STEPS:
            ratios = [
                math.log(loss(w, rule, start, steps, probe, s) / loss(w, rule, start, steps, 0, s))
                for w, rule, s in product(workloads, RULES, seeds)
            ]
            row.append(f"{math.exp(statistics.fmean(ratios)):.2f}")
        rows.append(row)
    print(grid(["start", "sweep", *(f"{steps} steps" for steps in STEPS)], rows))


if __name__ == "__main__":
    main()
