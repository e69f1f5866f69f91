"""Model selection: self-tuned runs inside against Optuna over everything, at equal wall time.

    python -m benchmarks.quality.selection [--only digits] [--seeds 3] [--journal FILE]
    python -m benchmarks.quality.selection --part memory|engine

``search``: on digits, 8,000 Fashion-MNIST images and six UCI sets, ``selftune.search.select``
over families (depth, width, dropout, …) against Optuna's TPE with ASHA over the same families *and*
optimizer, learning rate, momentum, weight decay, α and schedule. Both stop asking for trials after
the same seconds, one thread each; both keep a trial's best epoch by validation loss; the test
metric is that of the chosen model: accuracy in percent, or RMSE. ``trees``: gradient-boosted trees
of scikit-learn on the UCI sets, with its default settings, and tuned by TPE in the same seconds.
``reached``: the share of its time
after which ours was at or below the other's final validation loss (– if never). ``--journal`` keeps
rows and goes on. ``memory``: a run that starts from what the other UCI sets converged to.
``engine``: what a trial costs besides its run, and what a second worker brings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from benchmarks.quality.boosted_trees import boosted_trees
from benchmarks.quality.selection_jobs import CLASSES, TABLES, Job, Shuffled, Split, job, judged
from benchmarks.quality.warm_starts import memory
from selftune import search
from selftune.search import families

LOOKS = 20
"""Evaluations in a trial, by both."""
MEMBERS = 8
"""Trials from which an ensemble is chosen."""


def loss_of(model: nn.Module, loss: nn.Module, split: Split) -> float:
    """The mean loss of a whole split."""
    model.eval()
    with torch.no_grad():
        sums = [
            float(loss(model(x), y)) * len(x)
            for x, y in zip(split[0].split(1000), split[1].split(1000), strict=True)
        ]
    model.train()
    return sum(sums) / len(split[0])


# the two searches


@dataclass(frozen=True)
class Found:
    """What a search came to: test metric, best validation loss, trials, and its course.

    ``ensemble`` is the test metric of an ensemble of the best trials, if there is one.
    """

    test: float
    val: float
    trials: int
    course: list[tuple[float, float]]
    ensemble: float = math.nan


def ours(name: str, seed: int) -> Found:
    """Self-tuned runs inside; the ensemble is chosen from the same trials."""
    data = job(name)
    given: dict[str, Any] = dict(
        steps=data.steps, seed=seed, progress=False, fit=dict(evaluate_every=data.steps // LOOKS)
    )
    train, val = Shuffled(data, seed), data.batches("val")
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        given |= dict(storage=Path(folder) / "study.journal", log_dir=Path(folder) / "runs")
        joined = search.select(
            "auto", train, val, trials=10_000, timeout=data.seconds, ensemble=MEMBERS, **given
        )
        count = len(joined.study.trials)
        found = search.select("auto", train, val, trials=count, **given)
        lowest = course(found.study, begun)
    assert found.model is not None
    assert joined.model is not None
    test, ensemble = (
        judged(model, data.splits["test"], name in CLASSES) for model in (found.model, joined.model)
    )
    return Found(test, found.value, count, lowest, ensemble)


def plain(name: str, seed: int) -> Found:
    """Everything in Optuna's hands."""
    data = job(name)
    shape = search.Shape.of(data.batches("train"))
    kinds, loss = families.auto(shape), shape.loss()
    best: dict[str, Any] = {"val": math.inf}

    def objective(trial: optuna.Trial) -> float:
        torch.manual_seed(seed)
        family = trial.suggest_categorical("family", list(kinds))
        model = kinds[family](search.Space(trial, family))
        optimizer, decay = _optimizer(trial, model)
        steps = data.steps
        linear = trial.suggest_categorical("schedule", ("linear", "inverse")) == "linear"
        shape_of: Callable[[int], float] = (
            (lambda t: 1 - t / steps) if linear else (lambda t: 1 / (1 + decay * t))
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape_of)
        lowest = math.inf
        batches = _endless(data, seed)
        for look in range(LOOKS):
            for x, y in itertools.islice(batches, steps // LOOKS):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
                schedule.step()
            val = loss_of(model, loss, data.splits["val"])
            if not math.isfinite(val):
                raise optuna.TrialPruned
            lowest = min(lowest, val)
            if val < best["val"]:
                test = judged(model, data.splits["test"], name in CLASSES)
                best.update(val=val, test=test)
                model.train()
            trial.report(val, look + 1)
            if trial.should_prune():
                raise optuna.TrialPruned
        return lowest

    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=3)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    begun = time.time()
    study.optimize(objective, timeout=data.seconds)
    return Found(best["test"], best["val"], len(study.trials), course(study, begun))


def _optimizer(trial: optuna.Trial, model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    kind = trial.suggest_categorical("optimizer", ("SGD", "AdamW", "RMSprop"))
    lr = trial.suggest_float(f"{kind}.lr", *_RATES[kind], log=True)
    momentum = 1 - trial.suggest_float("1 - momentum", 0.01, 1.0, log=True)
    wd = trial.suggest_float(
        f"{kind}.weight_decay", 1e-6, 1.0 if kind == "AdamW" else 1e-2, log=True
    )
    alpha = trial.suggest_float("alpha", 1e-5, 1e-1, log=True)
    params = list(model.parameters())
    if kind == "SGD":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=wd), alpha
    if kind == "AdamW":
        betas = (momentum, 0.999)
        return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=wd), alpha
    return torch.optim.RMSprop(params, lr=lr, momentum=momentum, weight_decay=wd), alpha


_RATES = {"SGD": (1e-3, 1.0), "AdamW": (1e-4, 1e-1), "RMSprop": (1e-4, 1e-1)}


def _endless(data: Job, seed: int) -> Iterator[Split]:
    shuffled = Shuffled(data, seed)
    while True:
        yield from shuffled


def course(study: optuna.Study, begun: float) -> list[tuple[float, float]]:
    """Seconds, and the best validation loss by then."""
    found, best = [], math.inf
    ended = [t for t in study.trials if t.datetime_complete is not None]
    for trial in sorted(ended, key=lambda t: t.datetime_complete or 0):
        values = [trial.value] if trial.value is not None else []
        values += [v for v in trial.intermediate_values.values() if math.isfinite(v)]
        best = min([best, *values])
        assert trial.datetime_complete is not None
        found.append((trial.datetime_complete.timestamp() - begun, best))
    return found


def reached(ours: Found, theirs: Found) -> float:
    """The share of their time after which ours was as low."""
    total = theirs.course[-1][0]
    times = [t for t, value in ours.course if value <= theirs.val]
    return times[0] / total if times else math.inf


def searches(names: list[str], seeds: list[int], journal: Path | None) -> None:
    """The table of searches."""
    known: dict[str, dict[str, Any]] = {}
    if journal is not None and journal.exists():
        for line in journal.read_text().splitlines():
            entry = json.loads(line)
            known[entry["key"]] = entry
    print(
        "| data | seed | ours, test | ensemble | Optuna, test | trees, test | ours, val "
        "| Optuna, val | trials | reached |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    shares: list[float] = []
    for name in names:
        tests: list[tuple[float, ...]] = []
        for seed in seeds:
            key = f"{name} {seed}"
            if key not in known:
                a, b = ours(name, seed), plain(name, seed)
                known[key] = dict(
                    key=key, tests=(a.test, a.ensemble, b.test), vals=(a.val, b.val),
                    trials=(a.trials, b.trials), reached=reached(a, b),
                    trees=boosted_trees(name, seed) if name in TABLES else (),
                )  # fmt: skip
                if journal is not None:
                    with journal.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            one = known[key]
            tests.append((*one["tests"], *one["trees"]))
            trees = ", ".join(f"{t:.4g}" for t in one["trees"])
            shares.append(one["reached"])
            share = "–" if math.isinf(one["reached"]) else f"{one['reached']:.2f}"
            print(
                f"| {name} | {seed} | {one['tests'][0]:.4g} | {one['tests'][1]:.4g} "
                f"| {one['tests'][2]:.4g} | {trees} "
                f"| {one['vals'][0]:.4g} | {one['vals'][1]:.4g} "
                f"| {one['trials'][0]}, {one['trials'][1]} | {share} |", flush=True,
            )  # fmt: skip
        a, joined, b, *trees = (statistics.median(column) for column in zip(*tests, strict=True))
        better = a > b if name in CLASSES else a < b
        told = ", ".join(f"{t:.4g}" for t in trees)
        print(
            f"| {name} | median | {a:.4g} | {joined:.4g} | {b:.4g} | {told} | | | "
            f"| {'better' if better else 'worse'} |"
        )
    print(f"\nreached, median: {statistics.median(shares):.2f}", flush=True)


# the engine


def engine() -> None:
    """Milliseconds a trial besides its run; and the throughput of two workers."""
    with tempfile.TemporaryDirectory() as folder:
        count = 200
        begun = time.perf_counter()
        search.select(_nothing, trials=count, storage=Path(folder) / "a.journal", progress=False)
        each = 1e3 * (time.perf_counter() - begun) / count
        print(f"a trial besides its run, with the journal: {each:.1f} ms ({count} trials)")
        times = {}
        for workers in (1, 2):
            begun = time.perf_counter()
            search.select(
                _busy, trials=60, storage=Path(folder) / f"{workers}.journal", workers=workers,
                progress=False, sampler="random",
            )  # fmt: skip
            times[workers] = time.perf_counter() - begun
        print(f"two workers: {times[1] / times[2]:.2f} times the throughput of one "
              f"({times[1]:.1f} s, {times[2]:.1f} s)")  # fmt: skip


def _nothing(space: search.Space) -> float:
    return sum(space.suggest_float(f"x{i}", 0, 1) for i in range(5))


def _busy(space: search.Space) -> float:
    torch.set_num_threads(1)
    x = space.suggest_float("x", 0, 1)
    a = torch.rand(200, 200)
    for _ in range(12_000):  # about as much work as a small run, the same in every trial
        a = (a @ a).tanh()
    return x + 0 * float(a.sum())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("search", "memory", "engine"), default="search")
    parser.add_argument("--only", help="one data set")
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--journal", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("selftune", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = [args.seed] if args.seed is not None else list(range(args.seeds))
    if args.part == "engine":
        engine()
    elif args.part == "memory":
        memory(seeds)
    else:
        names = [args.only] if args.only else [*CLASSES[:2], *TABLES]
        searches(names, seeds, args.journal)


if __name__ == "__main__":
    main()
