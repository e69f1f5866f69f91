"""Hyperparameters of each group or tensor: how far apart they may move.

    SELFTUNE_DATA=... python -m benchmarks.quality.scopes [--rule SGD] [--seeds 3]
        [--only energy,concrete,yacht]

One run of ``st.AdamW``, or ``st.SGD`` (momentum 0.9), with ``per="group"`` (a group for each layer)
and with ``per="tensor"``, at several shares of the changes beyond the mean one
(``HyperSettings.apart``), over the run of the same seed with ``per="run"``. Printed are geometric
means of the ratios of validation and test
losses over workloads and seeds, with their standard errors.
"""

from __future__ import annotations

import argparse
import logging
import math
from functools import partial
from itertools import product

import torch

import selftune as st
from benchmarks.proof.rendering import grid
from benchmarks.quality.shells import Make, cell, tuned
from benchmarks.workloads import SUITE, Workload
from selftune.method import HyperSettings, MethodSettings

SHARES = (1.0, 0.3, 0.1)


RULES: dict[str, Make] = {
    "AdamW": partial(st.AdamW, lr=1e-3), "SGD": partial(st.SGD, lr=1e-2, momentum=0.9)
}  # fmt: skip


def losses(
    make: Make, workload: Workload, seed: int, per: str, apart: float
) -> tuple[float, float]:
    """Validation and test loss of a run."""
    model = workload.model(seed)
    layers = [list(m.parameters(recurse=False)) for m in model.modules()]
    opt = make(
        [{"params": params} for params in layers if params], per=per,
        total_steps=workload.steps, settings=MethodSettings(hyper=HyperSettings(apart=apart)),
    )  # fmt: skip
    return tuned(workload, model, opt, seed)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", choices=RULES, default="AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="energy,concrete,yacht")
    args = parser.parse_args()
    logging.getLogger("selftune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    make = RULES[args.rule]
    ways = list(product(("group", "tensor"), SHARES))
    logs: dict[tuple[str, float], list[list[float]]] = {way: [[], []] for way in ways}
    for name in args.only.split(","):
        workload = SUITE[name]()
        for seed in range(args.seeds):
            base = losses(make, workload, seed, "run", 1.0)
            for way in ways:
                for kept, ours, theirs in zip(
                    logs[way], losses(make, workload, seed, *way), base, strict=True
                ):
                    kept.append(math.log(ours / theirs))
    rows = [[per, str(apart), *map(cell, logs[per, apart])] for per, apart in ways]
    print(grid(["per", "apart", "validation ÷ one for all", "test"], rows))


if __name__ == "__main__":
    main()
