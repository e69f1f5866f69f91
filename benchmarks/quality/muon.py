"""One self-tuned run of Muon against torch's Muon at the best of five rates with a cosine.

    SELFTUNE_DATA=... python -m benchmarks.quality.muon [--seeds 0,1,2] [--only fashion-vit]

The matrices of ``st.muon_groups`` are trained by Muon, the rest by AdamW. The rival is
``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` with ``torch.optim.AdamW`` at the same rate,
both annealed along a cosine, for five rates, of which the lowest validation loss counts. Ours are
``st.Muon`` and ``st.Tuner(rule=st.rules.Muon())`` from the default rate of 1e-3, ``st.Muon`` from
rates 30 times lower and higher, and ``st.AdamW`` for comparison. Printed are validation losses
at the end (of the averaged weights where there are any), the rate, and ratios to the rival:
geometric means over seeds with their standard errors.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable

import torch
from torch import nn

import selftune as st
from benchmarks.proof.rendering import grid
from benchmarks.quality.shells import cell, finite, tuned
from benchmarks.workloads import Workload, named

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DEFAULT = 1e-3
ONLY = "shakespeare-transformer,fashion-vit"


def rival(workload: Workload, lr: float, seed: int) -> float:
    """The validation loss of a run of torch's Muon and AdamW along a cosine."""
    model: nn.Module = workload.model(seed)
    hidden, rest = st.muon_groups(model)
    opts = [
        torch.optim.Muon(hidden["params"], lr=lr, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest["params"], lr=lr),
    ]
    cosines = [torch.optim.lr_scheduler.CosineAnnealingLR(o, workload.steps) for o in opts]
    train = workload.batches("train", seed)
    for _ in range(workload.steps):
        model.zero_grad()
        workload.loss(model, next(train)).backward()
        for each in (*opts, *cosines):
            each.step()
    return finite(workload.evaluate(model, "val"))


def by_shell(make: Callable[..., torch.optim.Optimizer], lr: float) -> Callable:
    """The loss and the rate at the end of an optimizer's run."""

    def run(workload: Workload, seed: int) -> tuple[float, float]:
        model = workload.model(seed)
        opt = make(model, lr=lr, total_steps=workload.steps)
        loss = tuned(workload, model, opt, seed)[0]
        return finite(loss), opt.hparams["lr"]  # type: ignore[attr-defined]

    return run


def by_tuner(workload: Workload, seed: int) -> tuple[float, float]:
    """The loss and the rate at the end of a tuner's run."""
    model = workload.model(seed)
    tuner = st.Tuner(
        model, workload.criterion, rule=st.rules.Muon(), hparams={"lr": DEFAULT}, compile=False
    )
    train, val = workload.batches("train", seed), workload.batches("val", seed, 2)
    batches = [next(train) for _ in range(workload.steps)]
    count = len(workload.splits["val"][0]) // (2 * workload.batch_size)
    held = [next(val) for _ in range(max(1, count))]
    result = tuner.fit(batches, held, steps=workload.steps, progress=False)
    return finite(workload.evaluate(model, "val")), result.hparams["lr"]


OURS = {
    "st.Muon": by_shell(st.Muon, DEFAULT),
    "st.Muon ÷ 30": by_shell(st.Muon, DEFAULT / 30),
    "st.Muon × 30": by_shell(st.Muon, DEFAULT * 30),
    "st.Tuner": by_tuner,
    "st.AdamW": by_shell(st.AdamW, DEFAULT),
}


def main() -> None:
    """Print each run, and the table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=ONLY)
    parser.add_argument("--ours", default=",".join(OURS))
    args = parser.parse_args()
    logging.getLogger("selftune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    table = []
    for name in args.only.split(","):
        workload = named(name)
        logs: dict[str, list[float]] = {}
        for seed in map(int, args.seeds.split(",")):
            losses = {lr: rival(workload, lr, seed) for lr in RATES}
            best = min(losses, key=losses.__getitem__)
            shown = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
            print(f"{name}, seed {seed}: torch's Muon {shown}", flush=True)
            for kind in args.ours.split(","):
                loss, rate = OURS[kind](workload, seed)
                logs.setdefault(kind, []).append(math.log(loss / losses[best]))
                print(f"{name}, seed {seed}: {kind} {loss:.4f}, rate {rate:.3g}", flush=True)
        table += [[name, kind, cell(found)] for kind, found in logs.items()]
    print(grid(["workload", "run", "÷ best of five"], table))


if __name__ == "__main__":
    main()
