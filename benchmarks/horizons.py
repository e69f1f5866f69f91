"""Which regularizers only pay over a whole run, so that no gradient of tens of steps finds them.

    python -m benchmarks.horizons [--job text] [--name ar] [--values 0.01,0.1,1,4] [--seeds 2]

A plain AdamW run of ``benchmarks.regularizers`` at weak regularizers, linear decay. *Branches*: at
parts of it one strength is changed, and the validation loss of the averaged weights is taken 25,
100 and 200 steps later: what a hypergradient over that horizon can see. *Whole*: the loss at the
end of a run with that strength from its first step. Where the two have opposite order, tuning
along gradients within the run ends elsewhere than a search over whole runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterable

import torch
from torch import nn

import selftune as st
from benchmarks.regularizers import JOBS, Batch, Job, set_strengths, trial

WEAK = dict(embedding=0.01, input=0.04, dropconnect=0.06, hidden=0.02, output=0.08, ar=0.01,
            tar=0.01, first=0.1, second=0.1, third=0.05, label_smoothing=0.005, translate=0.005,
            scale=0.005, brightness=0.02, cutout=0.1)  # fmt: skip
UPDATE = dict(lr=0.015, weight_decay=0.02)
PARTS, AFTER = (0.05, 0.4), (25, 100, 200)


class Plain:
    """A plain run that can be copied in the middle."""

    def __init__(self, job: Job, seed: int) -> None:
        torch.manual_seed(seed)
        self.job, self.taken = job, 0
        self.model, self.loss_fn, self.augment = job.make(), job.loss(), job.augment()
        self.parts = nn.ModuleList(m for m in (self.model, self.loss_fn, self.augment) if m)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.params, **UPDATE)
        self.average: torch.optim.swa_utils.AveragedModel | None = None

    def train(self, batches: Iterable[Batch]) -> None:
        """Steps of the whole run's linear decay."""
        self.model.train()
        for x, y in batches:
            rate = UPDATE["lr"] * (1 - self.taken / self.job.steps)
            self.optimizer.param_groups[0]["lr"] = rate
            x, y = (x, y) if self.augment is None else self.augment(x, y)
            self.optimizer.zero_grad()
            (self.loss_fn(self.model(x), y) + st.nn.extra_loss(self.model)).backward()
            nn.utils.clip_grad_norm_(self.params, 10.0)
            self.optimizer.step()
            self.taken += 1
            if self.average is not None:
                self.average.update_parameters(self.model)

    def branch(self, batches: list[Batch], values: dict[str, float]) -> list[float]:
        """Validation losses of the averaged weights, steps after a change of strengths."""
        other = copy.deepcopy(self)
        set_strengths(other.parts, values)
        other.average = torch.optim.swa_utils.AveragedModel(
            other.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98),
            use_buffers=True,
        )  # fmt: skip
        losses = []
        for start, end in itertools.pairwise((0, *AFTER)):
            other.train(batches[start:end])
            losses.append(self.job.score(other.average.module, "val"))
        return losses


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=tuple(JOBS), default="text")
    parser.add_argument("--name", default="ar", help="the regularizer")
    parser.add_argument("--values", default="0.01,0.1,1,4")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    job, strengths = JOBS[args.job](), [float(v) for v in args.values.split(",")]
    known = {n: WEAK[n] for n in job.space}
    found: dict[float, list[list[float]]] = {s: [] for s in strengths}
    for seed in range(args.seeds):
        run = Plain(job, seed)
        set_strengths(run.parts, known)
        batches = list(itertools.islice(job.batches("train", seed), job.steps))
        rows: dict[float, list[float]] = {s: [] for s in strengths}
        for part in PARTS:
            at = int(part * job.steps)
            run.train(batches[run.taken : at])
            for s in strengths:
                rows[s] += run.branch(batches[at : at + AFTER[-1]], {**known, args.name: s})
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
