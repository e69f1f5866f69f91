"""Searches: many runs, of which the one with the lowest validation loss is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.proof.annealed import ANNEALED, LION_RATES, MUON_RATES
from benchmarks.proof.contenders import METHODS, Config, draw, fixed, search_space, selftune
from benchmarks.proof.training import CHECKPOINTS, Record, train
from benchmarks.workloads import Workload

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TRIALS = 50
FIRST_START = 500
"""Seeds of random starts that the pool does not hold."""

COSINE, MUON, LION = (f"{name}, best of 5" for name in ("cosine", "muon", "lion"))
FAMILIES = {
    COSINE: [f"cosine {rate:g}" for rate in RATES],
    MUON: [f"muon {rate:g}" for rate in MUON_RATES],
    LION: [f"lion {rate:g}" for rate in LION_RATES],
}
"""Methods of which the run with the lowest validation loss is kept, for every seed."""

Runner = Callable[[Workload, int], Record]


def _random(workload: Workload, seed: int) -> Record:
    return train(workload, "random", fixed(draw(seed)), seed, checkpoints=0)


def _start(workload: Workload, seed: int) -> Record:
    """One self-tuned run from a random start; the schedule is our own."""
    start = draw(FIRST_START + seed)
    return train(workload, "selftune-random", selftune(start), seed, checkpoints=0)


def _cosine(rate: float) -> Runner:
    config = Config(lr=rate, schedule="cosine")
    name = f"cosine {rate:g}"
    return lambda workload, seed: train(workload, name, fixed(config), seed)


def tpe(workload: Workload, seed: int, prune: bool = False, trials: int = TRIALS) -> Record:
    """Optuna's TPE over the pool's space, with successive halving or without."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.SuccessiveHalvingPruner(1) if prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True), pruner=pruner
    )
    best: list[Record] = []
    spent, curve, begun = 0.0, [], time.perf_counter()

    def objective(trial: optuna.Trial) -> float:
        nonlocal spent
        config = search_space(
            lambda name, low, high: trial.suggest_float(name, low, high, log=True),
            trial.suggest_categorical,
        )
        reached = 0

        def heard(number: int, loss: float) -> None:
            nonlocal reached
            reached = number
            trial.report(min(loss, 1e9), number)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            made = fixed(config)
            record = train(workload, "", made, trial.number, CHECKPOINTS * prune, heard)
            reached = CHECKPOINTS
        finally:
            spent += max(reached, 1) / CHECKPOINTS
        if not best or record.own["val"] < best[0].own["val"]:
            best[:] = [record]
            curve.append((spent, record.own["val"]))
        return min(record.own["val"], 1e9)

    study.optimize(objective, n_trials=trials)
    name, found = "tpe+asha" if prune else "tpe", best[0]
    return Record(
        workload.name, name, seed, found.own, found.average, curve, round(spent * workload.steps),
        time.perf_counter() - begun, found.ends,
    )  # fmt: skip


RUNNERS: dict[str, Runner] = {
    **{n: (lambda w, s, n=n, m=m: train(w, n, m, s)) for n, m in {**METHODS, **ANNEALED}.items()},
    **{f"cosine {rate:g}": _cosine(rate) for rate in RATES},
    "random": _random,
    "selftune-random": _start,
    "tpe": tpe,
    "tpe+asha": lambda workload, seed: tpe(workload, seed, prune=True),
}
"""Everything that leaves a record, by name."""


def seeds(method: str, seeds: int, pool: int, starts: int, searches: int = 3) -> Iterator[int]:
    """How often a method is run."""
    counts = {"random": pool, "selftune-random": starts, "tpe": 1, "tpe+asha": searches}
    yield from range(counts.get(method, seeds))
