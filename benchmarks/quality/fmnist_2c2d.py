"""DeepOBS's ``fmnist_2c2d`` (Schneider et al. 2019; Schmidt et al. 2021, "Crowded Valley").

Two convolutions and two linear layers (3.3 million weights, ReLU) on Fashion-MNIST, pixels in
[0, 1], batches of 128, 100 epochs, no penalty and no augmentation; 10,000 of the training images
are for validation, as in DeepOBS. Tuned optimizers reach about 92.3 % test accuracy there, and a
lowest test loss of about 0.25 by early stopping. Ours is one run from the defaults, whose
hyperparameters are tuned on batches of the validation images. Printed are loss and accuracy over
the whole validation and test set at the weights that the run ends with, its time and its final
hyperparameters.

    SELFTUNE_DATA=... python -m benchmarks.quality.fmnist_2c2d [--seeds 0,1,2] [--face tuner]
        [--rule SGD] [--epochs 100] [--records FILE]

A run takes two hours on one core. ``--records FILE`` appends every run as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.proof.drivers import FACES, STARTS, SelfTuned, Shuffled, make_tuner
from benchmarks.proof.training import judge, train
from benchmarks.workloads import Workload, load_fashion_mnist
from benchmarks.workloads.images import as_pixels

BATCH = 128
VALIDATION = 10_000


def network() -> nn.Module:
    """The network of DeepOBS: weights normal with σ = 0.05, cut off at 2 σ; biases 0.05."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )
    for name, tensor in net.named_parameters():
        if name.endswith("weight"):
            nn.init.trunc_normal_(tensor, std=0.05, a=-0.1, b=0.1)
        else:
            nn.init.constant_(tensor, 0.05)
    return net


@cache
def workload(epochs: int) -> Workload:
    """The job, for so many epochs."""
    x, y, test_x, test_y = load_fashion_mnist()
    x, test_x = as_pixels(x), as_pixels(test_x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    val, rest = order[:VALIDATION], order[VALIDATION:]
    return Workload(
        name="fmnist_2c2d",
        make_model=network,
        splits={"train": (x[rest], y[rest]), "val": (x[val], y[val]), "test": (test_x, test_y)},
        batch_size=BATCH,
        steps=epochs * (len(rest) // BATCH),
    )


def told(number: int, loss: float) -> None:
    """Print a validation loss on the way."""
    print(f"  after {number} tenths: validation loss {loss:.4f}", flush=True)


def by_optimizer(job: Workload, rule: str, seed: int) -> dict[str, Any]:
    """One run of ``st.AdamW`` or ``st.SGD`` in a loop."""
    record = train(job, "selftune", partial(SelfTuned, rule=rule), seed, heard=told)
    return {**record.own, "seconds": record.seconds, "ends": record.ends}


def by_tuner(job: Workload, rule: str, seed: int) -> dict[str, Any]:
    """One run of ``st.Tuner``."""
    model = job.model(seed)
    begun = time.perf_counter()
    result = make_tuner(job, model, rule).fit(
        Shuffled(job, "train", seed), Shuffled(job, "val", seed + 777),
        steps=job.steps, evaluate_every=job.steps // 10, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    return {**judge(job, model), "seconds": seconds, "ends": result.hparams}


def row(run: dict[str, Any]) -> str:
    """A line of the table."""
    ends = ", ".join(f"{k} {v:.3g}" for k, v in run["ends"].items() if math.isfinite(v))
    return (
        f"| {run['rule']}, {run['face']} | {run['seed']} | {run['val']:.4f} | {run['test']:.4f} "
        f"| {100 * run['test_accuracy']:.2f} | {run['seconds'] / 60:.0f} | {ends} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every seed, and print the table."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--seeds", default="0,1,2", help="comma-separated")
    made.add_argument("--face", default="optimizer", choices=FACES)
    made.add_argument("--rule", default="AdamW", choices=STARTS)
    made.add_argument("--epochs", type=int, default=100)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--records", type=Path)
    args = made.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    job = workload(args.epochs)
    go = {"optimizer": by_optimizer, "tuner": by_tuner}[args.face]
    print("| driver | seed | validation loss | test loss | test accuracy, % | minutes | ends |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for seed in map(int, args.seeds.split(",")):
        run = {"face": args.face, "rule": args.rule, "seed": seed, "epochs": args.epochs,
               **go(job, args.rule, seed)}  # fmt: skip
        if args.records:
            with args.records.open("a") as file:
                print(json.dumps(run), file=file)
        print(row(run), flush=True)


if __name__ == "__main__":
    main()
