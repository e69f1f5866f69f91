"""Which regularizers only pay over a whole run, so that no gradient of tens of steps finds them.

    python -m benchmarks.quality.horizons [--job text] [--name ar] [--values 0.01,0.1,1,4]

A plain AdamW run of ``benchmarks.quality.regularizers`` at weak regularizers, linear decay.
*Branches*: at parts of it one strength is changed, and the validation loss of the averaged weights
is taken 25, 100 and 200 steps later: what a hypergradient over that horizon can see. *Whole*: the
loss at the end of a run with that strength from its first step. Where the two have opposite order,
tuning along gradients within the run ends elsewhere than a search over whole runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics

import torch

from benchmarks.quality.regularizer_jobs import JOBS, Batch
from benchmarks.quality.regularizers import PlainRun, trial

WEAK = dict(embedding=0.01, input=0.04, dropconnect=0.06, hidden=0.02, output=0.08, ar=0.01,
            tar=0.01, first=0.1, second=0.1, third=0.05, label_smoothing=0.005, translate=0.005,
            scale=0.005, brightness=0.02, cutout=0.1)  # fmt: skip
UPDATE = dict(lr=0.015, weight_decay=0.02)
PARTS, AFTER = (0.05, 0.4), (25, 100, 200)


def branch(run: PlainRun, batches: list[Batch], values: dict[str, float]) -> list[float]:
    """Validation losses of the averaged weights, steps after a change of strengths."""
    other = copy.deepcopy(run)
    other.set(values)
    other.begin_average()
    losses = []
    for start, end in itertools.pairwise((0, *AFTER)):
        other.train(batches[start:end])
        losses.append(other.score("val"))
    return losses


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=tuple(JOBS), default="text")
    parser.add_argument("--name", default="ar", help="the regularizer")
    parser.add_argument("--values", default="0.01,0.1,1,4")
    parser.add_argument("--start", type=float, help="its strength before branches; a weak one")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    job, strengths = JOBS[args.job](), [float(v) for v in args.values.split(",")]
    known = {n: WEAK[n] for n in job.space}
    before = {**UPDATE, **known, args.name: known[args.name] if args.start is None else args.start}
    found: dict[float, list[list[float]]] = {s: [] for s in strengths}
    for seed in range(args.seeds):
        run = PlainRun(job, before, seed)
        batches = list(itertools.islice(job.batches("train", seed), job.steps))
        rows: dict[float, list[float]] = {s: [] for s in strengths}
        for part in PARTS:
            at = int(part * job.steps)
            run.train(batches[run.taken : at])
            for s in strengths:
                rows[s] += branch(run, batches[at : at + AFTER[-1]], {**known, args.name: s})
        for s in strengths:
            whole = trial(job, {**UPDATE, **known, args.name: s}, seed)[0]
            found[s].append([*rows[s], whole])
    places = [f"{p:.0%} + {a}" for p in PARTS for a in AFTER]
    print(f"| {args.name} | {' | '.join(places)} | whole run |\n|---|{'---|' * (len(places) + 1)}")
    for s, runs in found.items():
        means = [statistics.fmean(column) for column in zip(*runs, strict=True)]
        print(f"| {s:g} | {' | '.join(f'{m:.4f}' for m in means)} |", flush=True)


if __name__ == "__main__":
    main()
