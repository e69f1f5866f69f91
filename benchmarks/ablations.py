"""What each part of the method buys: one change at a time, on the suite of the proof.

    SELFTUNE_DATA=... python -m benchmarks.ablations [--changes "every 10;γ = 0.97"] [--seeds 2]

Prints, for every change, the mean change of the validation loss over workloads (of its logarithm,
in percent; below 0 is better than the default), how many workloads it improves, and the median and
worst rank in the pool of random-search runs. The table is kept in ``docs/ablations.md``, changes
that lost included. Needs the records of ``benchmarks.run --methods random`` for ranks.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import selftune as st
from benchmarks.proof import contenders
from benchmarks.proof.contenders import Config, selftune
from benchmarks.proof.rendering import by_workload, losses
from benchmarks.proof.scoring import middle, rank
from benchmarks.proof.training import train
from benchmarks.run import EVERYTHING, records
from benchmarks.workloads import SUITE
from selftune import floor, guard, hyperstep, probe, travel, tuning
from selftune.bijections import Logit, Memory
from selftune.floor import Floor
from selftune.optim import _base, _engine
from selftune.optim._engine import Engine
from selftune.optim._hypergradients import Hypergradients
from selftune.probe import Probe
from selftune.travel import Travel

Options = dict[str, object]
Patch = Callable[[], AbstractContextManager]


def adam(size: float) -> Callable:
    """The default hyper optimizer with another step size."""
    return partial(torch.optim.Adam, lr=size, betas=(0.8, 0.98))


class Eager(torch.optim.Adam):
    """The default hyper optimizer with a step that starts larger: size + more / (1 + t / while)."""

    def __init__(self, raw, size: float = 0.05, more: float = 0.2, during: float = 10) -> None:
        super().__init__(raw, lr=size, betas=(0.8, 0.98))
        self.size, self.more, self.during, self.taken = size, more, during, 0

    def step(self, closure=None):
        """With the size of its time."""
        self.param_groups[0]["lr"] = self.size + self.more / (1 + self.taken / self.during)
        self.taken += 1
        return super().step(closure)


def full(mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Every step is taken whole."""
    return torch.ones_like(mean)


def from_the_start(travel: Travel, square: float, step: int) -> float:
    """A stretch that counts as any other, and a mean that stays where the run began."""
    travel.squares += square
    travel.since = step
    return 0.0


def bounded(times: float) -> Callable[..., bool]:
    """A probe after which the rate may climb to so many times its choice, and no further."""
    probe_step = Engine._probe_step

    def step(self: Engine, probe: Probe, *rest: Any) -> bool:
        changed = probe_step(self, probe, *rest)
        if probe.ended and "lr" in self.tuning.rows:
            tuned = self.tuning.rows["lr"]
            highest = min(tuned.hparam.upper, times * float(tuned.values().max()))
            tuned.hparam = replace(tuned.hparam, upper=highest)
            tuned.limit(tuned.hparam.lower)  # also finds the ends anew
        return changed

    return step


def unscaled(signal: Tensor, grads: Sequence[Tensor], joined: Callable[[Tensor], Tensor]) -> Tensor:
    """Hypergradients along the outer gradient as it is."""
    return joined(signal)


def replaced(owner: object, name: str, value: object) -> Patch:
    """A name that stands for something else during the run."""
    return partial(patch.object, owner, name, value)


CHANGES: dict[str, tuple[Options, list[Patch]]] = {
    "default": ({}, []),
    "fixed hyperparameters, same schedule and average": ({"tune": (), "guard": False}, []),
    "outer loss at the last iterate": ({"average": st.Average(0.0)}, []),
    "average over 25 steps": ({"average": st.Average(0.96)}, []),
    "average over 12 steps": ({"average": st.Average(0.92)}, []),
    "average over 100 steps": ({"average": st.Average(0.99)}, []),
    "average over 200 steps": ({"average": st.Average(0.995)}, []),
    "γ = 0 (OneStep)": ({"estimator": st.OneStep()}, []),
    "γ = 0.95": ({"estimator": st.Trace(0.95, stride=4)}, []),
    "γ = 0.97": ({"estimator": st.Trace(0.97, stride=4)}, []),
    "every step observed": ({"estimator": st.Trace()}, []),
    "one step of ten observed": ({"estimator": st.Trace(stride=10)}, []),
    "no floor under weight decay": ({}, [replaced(floor, "SHRINKAGE", 1e-12)]),
    "floor of 0.1 under weight decay": ({}, [replaced(floor, "SHRINKAGE", 0.1)]),
    "floor of 1 under weight decay": ({}, [replaced(floor, "SHRINKAGE", 1.0)]),
    "weight decay does not follow the rate": (
        {},
        [replaced(Floor, "touched", staticmethod(lambda above: False))],
    ),
    "regularizers at twice the rate's pace": (
        {},
        [replaced(tuning, "PACE", {**tuning.PACE, "weight_decay": 2.0})],
    ),
    "one pace for all hyperparameters": ({}, [replaced(tuning, "PACE", {})]),
    "hyper step 0.3": ({"hyper_optimizer": adam(0.3)}, []),
    "hyper step 0.1": ({"hyper_optimizer": adam(0.1)}, []),
    "hyper step 0.05": ({"hyper_optimizer": adam(0.05)}, []),
    "hyper steps alike in runs of all lengths": ({}, [replaced(hyperstep, "POWER", 0.0)]),
    "hyper steps as the inverse of the length": ({}, [replaced(hyperstep, "POWER", 1.0)]),
    "trust above three times noise": ({}, [replaced(hyperstep, "SURE", 3.0)]),
    "larger hyper steps first": ({"hyper_optimizer": Eager}, []),
    "quicker moments of the hyper step": (
        {},
        [replaced(hyperstep, "BETAS", (0.6, 0.9))],
    ),
    "longer memory of the trust": ({}, [replaced(hyperstep, "RECENT", 0.9)]),
    "no trust": ({}, [replaced(hyperstep, "trust", full)]),
    "every 5": ({"every": 5}, []),
    "every 10": ({"every": 10}, []),
    "two validation batches joined": ({"joined": 2}, []),
    "four validation batches joined": ({"joined": 4}, []),
    "no probe": ({"probe": False}, []),
    "rate at most 1.5 times the probe's": ({}, [replaced(Engine, "_probe_step", bounded(1.5))]),
    "rate at most 3 times the probe's": ({}, [replaced(Engine, "_probe_step", bounded(3.0))]),
    "rate climbs wherever weights go": ({}, [replaced(Travel, "led", lambda *_: 1.0)]),
    "S from where the run began": ({}, [replaced(Travel, "add", from_the_start)]),
    "rate climbs from S² of 1.1 to 1.6": (
        {},
        [replaced(travel, "LOST", 1.1), replaced(travel, "LED", 1.6)],
    ),
    "rate climbs from S² of 1.2 to 1.7": (
        {},
        [replaced(travel, "LOST", 1.2), replaced(travel, "LED", 1.7)],
    ),
    "rate climbs from S² of 1.3 to 2": (
        {},
        [replaced(travel, "LOST", 1.3), replaced(travel, "LED", 2.0)],
    ),
    "rate climbs from the first step on": ({}, [replaced(_engine, "BEGINNING", 1e9)]),
    "probe without a margin": ({}, [replaced(_base, "Probe", partial(Probe, margin=1.0))]),
    "probe at half of its rate": ({}, [replaced(_base, "Probe", partial(Probe, margin=3.0))]),
    "probe at a quarter of its rate": ({}, [replaced(_base, "Probe", partial(Probe, margin=6.0))]),
    "β₁ as it is given": ({}, [replaced(probe, "LEAST", 1e9)]),
    "β₁ of 0.8 at most, after the probe": (
        {},
        [replaced(probe, "LEAST", 5), replaced(probe, "CALM", 1e9)],
    ),
    "β₁ of 0.7 at most, after the probe": (
        {},
        [replaced(probe, "LEAST", 10 / 3), replaced(probe, "CALM", 1e9)],
    ),
    "β₂ of 0.999": ({}, [replaced(contenders, "fitting_beta2", lambda steps: 0.999)]),
    "β₂ of 0.98": ({}, [replaced(contenders, "fitting_beta2", lambda steps: 0.98)]),
    "β₁ in odds": (
        {},
        [replaced(Memory, n, getattr(Logit, n)) for n in ("forward", "inverse", "slope")],
    ),
    "momenta at 1.5 times their pace": (
        {},
        [replaced(tuning, "PACE", {**tuning.PACE, "momentum": 0.3, "beta1": 0.3})],
    ),
    "hypergradients as long as they are": (
        {},
        [replaced(Hypergradients, "scaled", staticmethod(unscaled))],
    ),
    "no guard": ({"guard": False}, []),
    "good weights by means of three": ({}, [replaced(guard, "WINDOW", 3)]),
    "constant schedule": ({"schedule": "constant"}, []),
    "cosine schedule": ({"schedule": "cosine"}, []),
    "wsd schedule": ({"schedule": "wsd"}, []),
    "lr only": ({"tune": ("lr",)}, []),
    "lr and weight decay": ({"tune": ("lr", "weight_decay")}, []),
}


def run(name: str, change: str, seed: int) -> float:
    """The validation loss of a run with a change, in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    options, patches = CHANGES[change]
    with ExitStack() as stack:
        for change_it in patches:
            stack.enter_context(change_it())
        made = selftune(Config(), **options)
        return train(EVERYTHING[name](), change, made, seed, checkpoints=0).own["val"]


def line(change: str, found: dict[str, float], default: dict[str, float], pools: dict) -> str:
    """A row of the table."""
    logs = [math.log(found[n] / default[n]) for n in found]
    ranks = [rank(found[n], pools[n]) for n in found if n in pools]
    cells = [
        change, f"{100 * statistics.mean(logs):+.1f}", f"{sum(x < 0 for x in logs)} of {len(logs)}",
        f"{middle(ranks):.0f} / {max(ranks):.0f}" if ranks else "–",
        *(f"{found[n]:.4g}" + (f" ({rank(found[n], pools[n]):.0f})" if n in pools else "")
          for n in found),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", default=";".join(CHANGES), help="by name, separated by ;")
    parser.add_argument("--only", default=",".join(SUITE), help="workloads, by commas")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    tables = by_workload(records())
    pools = {n: losses(t["random"]) for n, t in tables.items() if "random" in t}
    print("| change | loss, % | better on | rank, median / worst |", " | ".join(names), "|")
    print("|---|" + "---|" * (len(names) + 3), flush=True)
    changes = list(dict.fromkeys(["default", *args.changes.split(";")]))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as executor:
        jobs = {
            c: {n: [executor.submit(run, n, c, s) for s in range(args.seeds)] for n in names}
            for c in changes
        }
        default: dict[str, float] = {}
        for change in changes:
            found = {n: middle([r.result() for r in runs]) for n, runs in jobs[change].items()}
            default = default or found
            print(line(change, found, default, pools), flush=True)


if __name__ == "__main__":
    main()
