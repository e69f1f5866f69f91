"""What a run predicts of other strengths, against training again with them.

    python -m benchmarks.quality.calibration --job images|text [--steps 300]

A run at fixed strengths learns how its weights respond to them. ``Tuner.predict`` then reads the
validation loss at strengths half a unit of log or odds lower and higher, and plain runs of the
same seed, batches and draws are trained there. A line each: both changes per unit, and how well
the predicted ones point where the real ones do. Needs ``SELFTUNE_DATA``.
"""

from __future__ import annotations

import argparse
import logging

import torch

import selftune as st
from benchmarks.quality.regularizer_jobs import JOBS, RATE, Job
from benchmarks.quality.regularizers import Endless

STEP = 0.5  # in raw (log or odds) space
LR = 3e-3


def middling(job: Job) -> dict[str, float]:
    """Strengths to start from: 0.1 for rates, low for the others."""
    return {n: 0.1 if ends == RATE else 0.02 for n, ends in job.space.items()}


def trained(
    job: Job, values: dict[str, float], names: list[str], steps: int, seed: int
) -> st.Tuner:
    """A run at fixed values that learns the response to ``names``."""
    torch.manual_seed(seed)
    tuner = st.Tuner(
        job.make(), job.loss(), augment=job.augment(), hparams={"lr": LR, **values}, tune=names,
        probe=False, guard=False, compile=False, seed=seed, hyper_rate=1e-12,
    )  # fmt: skip
    val = Endless(job, seed)
    tuner.fit(job.batches("train", seed), val, steps=steps, evaluate_every=steps, progress=False)
    return tuner


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=tuple(JOBS), required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    job = JOBS[args.job]()
    values = middling(job)
    tuner = trained(job, values, list(values), args.steps, args.seed)
    strengths = {f.hparam.name: f.hparam for f in st.nn.tunables(tuner.model).values()}
    strengths |= {
        f.hparam.name: f.hparam
        for part in (job.loss(), job.augment())
        if isinstance(part, torch.nn.Module)
        for f in st.nn.tunables(part).values()
    }
    print("| strength | predicted change a unit | real change a unit |\n|---|---|---|")
    pairs = []
    for name, value in values.items():
        scale = strengths[name].bijection
        raw = scale.inverse(torch.tensor(value, dtype=torch.float64))
        ends = [float(scale.forward(raw + sign * STEP)) for sign in (-1, 1)]
        low, high = tuner.predict(**{name: ends})
        again = [
            job.score(trained(job, values | {name: end}, [], args.steps, args.seed).model, "val")
            for end in ends
        ]
        pairs.append(((high - low) / (2 * STEP), (again[1] - again[0]) / (2 * STEP)))
        print(f"| {name} | {pairs[-1][0]:+.4f} | {pairs[-1][1]:+.4f} |", flush=True)
    found, real = torch.tensor(pairs, dtype=torch.float64).T
    cosine = torch.nn.functional.cosine_similarity(found, real, dim=0)
    print(f"\ncosine {cosine:.2f}, predicted ÷ real {found @ real / (real @ real):.2f}")


if __name__ == "__main__":
    main()
