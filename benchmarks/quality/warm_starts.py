"""Runs that start from what others converged to: ``selection --part memory``."""

from __future__ import annotations

import math
import statistics
import tempfile

import torch
from torch import nn

import selftune as st
from benchmarks.quality.selection_jobs import Shuffled, job, uci
from selftune import search

UCI = ("energy", "concrete", "yacht", "power", "wine_red")
STEPS = 2000


def _run(
    name: str, seed: int, start: dict[str, float] | None
) -> tuple[list[float], dict[str, float]]:
    """Validation losses by evaluation of a run of one net, and where it ended."""
    data, splits = job(name), uci(name)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(splits["train"][0].shape[1], 64), nn.ReLU(), nn.Linear(64, 64),
                        nn.ReLU(), nn.Linear(64, splits["train"][1].shape[1]))  # fmt: skip
    tuner = st.Tuner(net, nn.MSELoss(), seed=seed, compile=False, hparams={"lr": 1e-3})
    if start is not None:
        tuner.start_from(start)
    result = tuner.fit(Shuffled(data, seed), Shuffled(data, seed, "val"), steps=STEPS,
                       evaluate_every=STEPS // 40, progress=False)  # fmt: skip
    return result.history["score/loss"].tolist(), result.hparams


def memory(seeds: list[int]) -> None:
    """Steps of a warm-started run to the cold run's final validation loss."""
    print("| left out | seed | cold run's final loss | reached after, of its steps |")
    print("|---|---|---|---|", flush=True)
    shares = []
    for seed in seeds:
        cold = {name: _run(name, seed, None) for name in UCI}
        for left in UCI:
            with tempfile.TemporaryDirectory() as folder:
                kept = search.Memory(folder)
                for name, (losses, ended) in cold.items():
                    if name != left:
                        kept.remember(_task(name), ended, value=losses[-1])
                base = {"lr": 1e-3, "beta1": 0.9, "weight_decay": 0.01}
                warm, _ = _run(left, seed, kept.start(_task(left), base))
            goal = cold[left][0][-1]
            by = next((i + 1 for i, v in enumerate(warm) if v <= goal), None)
            share = math.inf if by is None else by / len(warm)
            shares.append(share)
            print(f"| {left} | {seed} | {goal:.4g} | {share:.2f} |", flush=True)
    print(f"\nmedian: {statistics.median(shares):.2f}")


def _task(name: str) -> search.Task:
    train = uci(name)["train"]
    shape = search.Shape.of([train])
    return search.Task.of(shape, len(train[0]), STEPS, 32, family="mlp")
