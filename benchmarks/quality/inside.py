"""Model selection: units removed within each run, against a search over widths.

    python -m benchmarks.quality.inside [--only digits] [--seeds 3] [--trials 12]

Both searches run the same number of trials with the same sampler, pruner, families and steps, on
one thread. The baseline searches over widths and numbers of blocks; with ``structure="inside"``
each run starts at the largest sizes, and units and blocks are removed within it. Times are process
times. *baseline*: seconds until the trial ended whose validation loss was the best of its search.
*ours*: seconds until a trial ended with that loss or a lower one (– if none did); the loss is that
of the smaller model. *ratio*: ours divided by baseline. *parameters*: of the two selected models.
With ten trials, three seeds: median ratio 1.24 on digits, inf on concrete, 1.58 on fashion.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import optuna
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.quality.selection_jobs import Job, Shuffled, job, judged
from selftune import search
from selftune.search import families


@dataclass(frozen=True)
class Found:
    """A search: seconds and validation loss of each finished trial, in order."""

    course: list[tuple[float, float]]
    parameters: int
    test: float

    @property
    def best(self) -> tuple[float, float]:
        """Seconds to the lowest loss, and that loss."""
        return min(self.course, key=lambda at: at[1])

    def reached(self, loss: float) -> float:
        """Seconds to a loss, or inf."""
        return next((t for t, value in self.course if value <= loss), math.inf)


@cache
def data_of(name: str) -> Job:
    """A data set, and the length of a trial."""
    if name != "fashion":
        whole = job(name)
        return Job(whole.splits, whole.batch, 600, 0.0)
    most = {"train": 2000, "val": 500, "test": 2000}
    splits = {
        k: (F.avg_pool2d(x[: most[k]], 2), y[: most[k]]) for k, (x, y) in job(name).splits.items()
    }
    return Job(splits, 64, 240, 0.0)


KINDS: dict[str, tuple[type[families.AbstractFamily], ...]] = {
    "digits": (families.MLP, families.ResNet),
    "concrete": (families.MLP, families.ResNet),
    "fashion": (families.CNN,),
}


def found(name: str, seed: int, trials: int, structure: Any) -> Found:
    """A search, with or without widths."""
    data = data_of(name)
    shape = search.Shape.of(data.batches("train"))
    starts: list[float] = []

    def timed(family: families.AbstractFamily) -> Callable[[search.Space], nn.Module]:
        def build(space: search.Space) -> nn.Module:
            starts.append(time.process_time())  # the trial before has ended
            return family(space)

        return build

    selection = search.select(
        {kind.__name__.lower(): timed(kind(shape)) for kind in KINDS[name]},
        Shuffled(data, seed), data.batches("val"), trials=trials, steps=data.steps, seed=seed,
        loss_fn=shape.loss(), structure=structure, tuner=dict(compile=False),
        fit=dict(evaluate_every=data.steps // 25), progress=False,
    )  # fmt: skip
    assert selection.model is not None
    ends = [end - starts[0] for end in starts[1:]]
    course = [
        (ends[trial.number], trial.value)
        for trial in selection.study.trials
        if trial.value is not None and trial.state.name == "COMPLETE"
    ]
    return Found(
        course, sum(p.numel() for p in selection.model.parameters()),
        judged(selection.model, data.splits["test"], name != "concrete"),
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(KINDS))
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for logger in ("selftune", "optuna"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = [args.seed] if args.seed is not None else list(range(args.seeds))
    print("| data | seed | loss: baseline, ours | s to the baseline's loss: baseline, ours "
          "| ratio | s in all | parameters | test |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|", flush=True)
    ratios: list[float] = []
    for name in [args.only] if args.only else list(KINDS):
        own: list[float] = []
        for seed in seeds:
            a = found(name, seed, args.trials, None)
            b = found(name, seed, args.trials, "inside")
            (first, loss), then = a.best, b.reached(a.best[1])
            own.append(then / first)
            shown = "–" if math.isinf(then) else f"{then:.1f}"
            print(
                f"| {name} | {seed} | {loss:.4g}, {b.best[1]:.4g} | {first:.1f}, {shown} "
                f"| {'–' if math.isinf(then) else f'{own[-1]:.2f}'} "
                f"| {a.course[-1][0]:.1f}, {b.course[-1][0]:.1f} "
                f"| {a.parameters:,}, {b.parameters:,} | {a.test:.4g}, {b.test:.4g} |", flush=True,
            )  # fmt: skip
        ratios += own
        print(f"| {name} | median | | | {statistics.median(own):.2f} | | | |", flush=True)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"\nratio, median: {statistics.median(ratios):.2f}, {spread} over {len(ratios)} searches")


if __name__ == "__main__":
    main()
