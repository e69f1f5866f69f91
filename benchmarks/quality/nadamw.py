"""Chooses the one configuration of NadamW with which the proof compares.

    SELFTUNE_DATA=... python -m benchmarks.quality.nadamw [--suite small] [--only digits]

Five learning rates times three pairs of β₁ and weight decay, which lie in the search space of
AlgoPerf's NadamW baselines (1 − β₁ from 0.02 to 0.5, weight decay from 0.005 to 1); the second
pair is that of its self-tuning baseline, rounded. Every configuration runs once on every workload,
with a seed that the comparison does not use. The configuration with the lowest geometric mean of
validation losses over the workloads is ``CALIBRATED`` in ``benchmarks.proof.annealed``. It is
chosen on the workloads on which it is compared, which favours this rival. Finished runs are
appended to ``--records`` and not repeated.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path

import torch

from benchmarks.proof.annealed import Nadam, nadamw
from benchmarks.proof.rendering import grid
from benchmarks.proof.training import train
from benchmarks.run import SUITES, keep, records

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PAIRS = ((0.9, 0.01), (0.93, 0.08), (0.8, 0.3))
SEED = 100


def label(config: Nadam) -> str:
    """The name of a configuration's records."""
    return f"nadamw {config.lr:g} {config.beta1:g} {config.weight_decay:g}"


CONFIGS = {label(c): c for c in (Nadam(lr, *pair) for lr, pair in product(RATES, PAIRS))}


def table(losses: dict[str, dict[str, float]]) -> str:
    """Every configuration's mean ratio to the lowest loss of a workload, and its worst ratio.

    Args:
        losses: By workload, then by configuration; only workloads with all of them count.

    Examples:
        >>> found = {"w": {"a": 1.0, "b": 2.0}, "v": {"a": 2.0, "b": 1.0}, "u": {"a": 1.0}}
        >>> print(table(found))
        | configuration | geometric mean ratio | worst |
        | --- | --- | --- |
        | a | 1.414 | 2.000 (v) |
        | b | 1.414 | 2.000 (w) |
    """
    names = sorted({name for own in losses.values() for name in own})
    whole = {w: own for w, own in losses.items() if own.keys() == set(names)}
    rows = []
    for name in names:
        ratios = {w: own[name] / min(own.values()) for w, own in whole.items()}
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        worst = max(ratios, key=ratios.__getitem__)
        rows.append((mean, [name, f"{mean:.3f}", f"{ratios[worst]:.3f} ({worst})"]))
    rows.sort(key=lambda row: row[0])
    return grid(["configuration", "geometric mean ratio", "worst"], [cells for _, cells in rows])


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="small")
    parser.add_argument("--only", default="", help="workloads, by commas")
    parser.add_argument("--records", type=Path, default=Path("nadamw"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.only.split(",") if args.only else list(SUITES[args.suite])
    for name in names:
        workload = SUITES[args.suite][name]()
        done = {(r.workload, r.method) for r in records(args.records)}
        for method, config in CONFIGS.items():
            if (name, method) not in done:
                found = train(workload, method, nadamw(config), SEED, checkpoints=0)
                keep(found, args.records)
    losses: dict[str, dict[str, float]] = {}
    for record in records(args.records):
        losses.setdefault(record.workload, {})[record.method] = record.own["val"]
    print(table(losses))


if __name__ == "__main__":
    main()
