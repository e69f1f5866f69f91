"""Every optimizer of the library against torch's own at the best of five rates with a cosine.

    SELFTUNE_DATA=... python -m benchmarks.quality.shells [--seeds 5] [--only digits,yacht]

On every workload of the suite one run of ``st.SGD`` (momentum 0.9), ``st.Adam``, ``st.RMSprop``,
``st.SelfTuning(NAdam)`` and ``st.Lion`` from torch's default rate (Lion: 1e-4), and from rates
that are drawn log-uniformly over six decades (``--starts``), against the same optimizer of torch
at the best of five rates, annealed along a cosine, chosen by its validation loss. Printed are the
ratios of the losses over the whole validation set, geometric means over seeds with their standard
errors; at the end the mean over workloads. torch has no Lion: its rival is that of
``pytorch-optimizer``, with the weight decay and the rates that its paper advises.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import selftune as st
from benchmarks.proof.annealed import LION_DECAY, LION_RATES
from benchmarks.proof.rendering import grid
from benchmarks.workloads import SUITE, Workload

Make = Callable[..., Any]


def lion(params: Any, lr: float) -> Any:
    """Lion of ``pytorch-optimizer`` (the extra ``bench``)."""
    from pytorch_optimizer import Lion

    return Lion(params, lr=lr, weight_decay=LION_DECAY)


SHELLS: dict[str, tuple[Make, Make, float, tuple[float, ...]]] = {
    # ours, torch's, the default rate, the five rates
    "SGD": (
        partial(st.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9), 1e-3,
        (1e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ),
    "Adam": (st.Adam, torch.optim.Adam, 1e-3, (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "RMSprop": (st.RMSprop, torch.optim.RMSprop, 1e-2, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "NAdam": (
        lambda params, **options: st.SelfTuning(
            torch.optim.NAdam(params, lr=options.pop("lr")), **options
        ),
        torch.optim.NAdam, 2e-3, (1e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "Lion": (st.Lion, lion, 1e-4, LION_RATES),
}  # fmt: skip


def ours(workload: Workload, make: Make, lr: float, seed: int) -> float:
    """The validation loss of a self-tuned run, at its averaged weights."""
    model = workload.model(seed)
    opt = make(model.parameters(), lr=lr, total_steps=workload.steps)
    return finite(tuned(workload, model, opt, seed)[0])


def tuned(workload: Workload, model: nn.Module, opt: Any, seed: int) -> tuple[float, float]:
    """Validation and test loss of a run, at its averaged weights."""
    train, val = workload.batches("train", seed), workload.batches("val", seed, 2)
    for _ in range(workload.steps):
        opt.zero_grad()
        workload.loss(model, next(train)).backward()
        opt.step()
        opt.hyper_step(lambda: workload.loss(model, next(val)))
    with opt.averaged():
        return workload.evaluate(model, "val"), workload.evaluate(model, "test")


def best(workload: Workload, make: Make, rates: Sequence[float], seed: int) -> float:
    """The lowest validation loss of five rates."""
    return min(annealed(workload, make, lr, seed) for lr in rates)


def annealed(workload: Workload, make: Make, lr: float, seed: int) -> float:
    """The validation loss of a run of torch's optimizer along a cosine."""
    model: nn.Module = workload.model(seed)
    train = workload.batches("train", seed)
    opt = make(model.parameters(), lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, workload.steps)
    for _ in range(workload.steps):
        opt.zero_grad()
        workload.loss(model, next(train)).backward()
        opt.step()
        cosine.step()
    return finite(workload.evaluate(model, "val"))


def finite(loss: float) -> float:
    """A run that is lost counts as a thousand."""
    return loss if math.isfinite(loss) else 1e3


def cell(logs: Sequence[float]) -> str:
    """A geometric mean of ratios and its standard error."""
    value = math.exp(statistics.mean(logs))
    error = value * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return f"{value:.3f} ± {error:.3f}"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=2, help="random starts for each seed")
    parser.add_argument("--only", default=",".join(SUITE))
    parser.add_argument("--shells", default=",".join(SHELLS))
    args = parser.parse_args()
    names, shells = args.only.split(","), args.shells.split(",")
    for given, known in ((names, SUITE), (shells, SHELLS)):
        if unknown := sorted({*given} - known.keys()):
            parser.error(f"{', '.join(unknown)}: unknown; use some of {', '.join(known)}")
    logging.getLogger("selftune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[float]] = {}
    for name in names:
        workload = SUITE[name]()
        for shell in shells:
            make, plain, default, rates = SHELLS[shell]
            draw = random.Random(f"{name} {shell}")
            rows: dict[str, list[float]] = {"default": [], "random": []}
            for seed in range(args.seeds):
                rival = math.log(best(workload, plain, rates, seed))
                rows["default"].append(math.log(ours(workload, make, default, seed)) - rival)
                for _ in range(args.starts):
                    lr = default * 10 ** draw.uniform(-3, 3)
                    rows["random"].append(math.log(ours(workload, make, lr, seed)) - rival)
            for kind, logs in rows.items():
                if logs:
                    found.setdefault((shell, kind), []).append(statistics.mean(logs))
                    print(f"{name} {shell} from {kind} rates: {cell(logs)}", flush=True)
    table = [[shell, kind, cell(logs), str(len(logs))] for (shell, kind), logs in found.items()]
    print(grid(["optimizer", "start", "÷ best of five", "workloads"], table))


if __name__ == "__main__":
    main()
