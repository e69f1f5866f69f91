"""One run that chooses its optimizer, against each of its rules alone.

    SELFTUNE_DATA=... python -m benchmarks.mixture [--seeds 3] [--only digits,fashion-cnn]

On an MLP, a CNN with BatchNorm, an LSTM and a transformer of the suite a run of ``st.Mixture`` of
SGD (momentum 0.9), AdamW and Lion is compared with a self-tuned run of ``st.SGD``, ``st.AdamW`` and
``st.Lion`` from their usual rates. Printed are the losses over the whole validation set at the
averaged weights, means over seeds; the ratio to the best of the three, geometric mean over seeds
with its standard error; the rules that were chosen; and the median time of a step over that of
``st.AdamW``, measured step by step in turn: of a whole run, and after the choice.

``--save FILE`` keeps every run as a line of JSON, and takes from there what it holds already.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import selftune as st
from benchmarks.proof.rendering import grid
from benchmarks.workloads import SUITE, Workload

JOBS = ("digits", "fashion-cnn", "shakespeare-lstm", "shakespeare-transformer")
RULES: dict[str, Callable[..., Any]] = {
    "SGD": partial(st.SGD, lr=1e-2, momentum=0.9),
    "AdamW": partial(st.AdamW, lr=1e-3),
    "Lion": partial(st.Lion, lr=1e-4),
    "Mixture": lambda params, **options: st.Mixture(
        params, [st.rules.SGD(), st.rules.AdamW(), st.rules.Lion()], lr=1e-3, **options
    ),
}
SINGLE = ("SGD", "AdamW", "Lion")


def step(workload: Workload, model: Any, opt: Any, train: Any, val: Any) -> None:
    """A step of the weights, and one of the hyperparameters where it is due."""
    opt.zero_grad()
    workload.loss(model, next(train)).backward()
    opt.step()
    opt.hyper_step(lambda: workload.loss(model, next(val)))


def run(name: str, rule: str, seed: int) -> tuple[float, str]:
    """Validation loss of a run at its averaged weights, and the rule it ended with."""
    workload = SUITE[name]()
    model = workload.model(seed)
    train, val = workload.batches("train", seed), workload.batches("val", seed, 2)
    opt = RULES[rule](model.parameters(), total_steps=workload.steps)
    for _ in range(workload.steps):
        step(workload, model, opt, train, val)
    with opt.averaged():
        loss = workload.evaluate(model, "val")
    chosen = opt.rule.name if rule == "Mixture" else rule
    return loss if math.isfinite(loss) else 1e3, chosen


def timed(name: str) -> tuple[float, float]:
    """Time of the mixture's step over AdamW's: mean of a run, and median after the choice."""
    workload = SUITE[name]()
    sides = []
    for rule in ("AdamW", "Mixture"):
        model = workload.model(0)
        train, val = workload.batches("train", 0), workload.batches("val", 0, 2)
        opt = RULES[rule](model.parameters(), total_steps=workload.steps)
        sides.append((partial(step, workload, model, opt, train, val), opt, list[float]()))
    after = 0
    for at in range(workload.steps):
        for take, _, times in sides:
            begun = time.perf_counter()
            take()
            times.append(time.perf_counter() - begun)
        if not after and sides[1][1].rule is not None:
            after = at + 1
    plain, mixed = (times for *_, times in sides)
    median = statistics.median
    late = median(mixed[after:]) / median(plain[after:])
    early = median(mixed[:after]) / median(plain[:after])
    share = after / workload.steps
    return share * early + (1 - share) * late, late


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(JOBS))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--save", type=Path, help="a file of runs to add to")
    parser.add_argument("--no-times", action="store_true")
    args = parser.parse_args()
    logging.getLogger("selftune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    known: dict[tuple[str, str, int], tuple[float, str]] = {}
    if args.save and args.save.exists():
        for line in args.save.read_text().splitlines():
            job, rule, seed, loss, chosen = json.loads(line)
            known[job, rule, seed] = loss, chosen
    rules = args.rules.split(",")
    rows = []
    for job in args.only.split(","):
        for rule in rules:
            for seed in range(args.seeds):
                if (job, rule, seed) in known:
                    continue
                known[job, rule, seed] = found = run(job, rule, seed)
                print(job, rule, seed, *found, flush=True)
                if args.save:
                    with args.save.open("a") as file:
                        file.write(json.dumps([job, rule, seed, *found]) + "\n")
        if set(rules) != set(RULES):
            continue
        losses = {r: [known[job, r, s][0] for s in range(args.seeds)] for r in RULES}
        best = min(SINGLE, key=lambda r: statistics.fmean(losses[r]))
        cells = [f"{statistics.fmean(losses[r]):.4f}" for r in RULES]
        for rival in (best, "AdamW"):
            pairs = zip(losses["Mixture"], losses[rival], strict=True)
            logs = [math.log(a / b) for a, b in pairs]
            value = math.exp(statistics.fmean(logs))
            error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
            cells.append(f"{value:.4f} ± {value * error:.4f}")
        chosen = Counter(known[job, "Mixture", s][1] for s in range(args.seeds))
        cells.append(", ".join(f"{n} {c}" for n, c in chosen.items()))
        cells += [] if args.no_times else [f"{ratio:.2f}" for ratio in timed(job)]
        rows.append([job, best, *cells])
        print(" | ".join(rows[-1]), flush=True)
    heads = ["job", "best alone", *RULES, "÷ best", "÷ AdamW", "chosen"]
    if rows:
        print(grid(heads if args.no_times else [*heads, "step", "after"], rows))


if __name__ == "__main__":
    main()
