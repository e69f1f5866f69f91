"""What each part of the method buys: one change at a time, on the suite of the proof.

    SELFTUNE_DATA=... python -m benchmarks.ablations [--changes "no guard;every 10"] [--seeds 4]

Every change is a few options that both drivers take; each run has the seed of a run without it.
Printed are, for each driver, the mean change of the logarithm of the validation loss over the
workloads in percent (below 0: the change is better), ± its standard error from pairs of seeds, and
on how many workloads the change is better. ``--face`` and ``--rule`` choose driver and rule,
``--only`` workloads, ``--suite extended`` the second list of them; ``--save FILE`` keeps every run
as a line of JSON and skips the runs that it holds already. A change takes about two minutes with
two seeds on two idle cores. The tables are kept in ``docs/ablations.md`` and
``docs/ablations-details.md``, changes that lost included.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import selftune as st
from benchmarks.faces import Ratio, row, together
from benchmarks.proof.drivers import FACES, STARTS, Run, work
from benchmarks.workloads import SUITES
from selftune.bijections import Logit
from selftune.control import GuardPolicy, SweepSettings
from selftune.method import (
    DisplacementLimit,
    FloorSettings,
    HyperSettings,
    MethodSettings,
    StiffSettings,
)

Options = dict[str, Any]
"""Arguments of ``benchmarks.proof.drivers.FACES``."""


def method(**settings: Any) -> Options:
    """Other settings of the method."""
    return {"settings": MethodSettings(**settings)}


def hyper(**settings: Any) -> Options:
    """Other settings of the hyperparameter steps."""
    return method(hyper=HyperSettings(**settings))


def limit(**settings: Any) -> Options:
    """Another limit of the learning rate by displacement."""
    return method(displacement=DisplacementLimit(**settings))


def floor(**settings: Any) -> Options:
    """Another floor under weight decay."""
    return method(floor=FloorSettings(**settings))


def sweep(**settings: Any) -> Options:
    """Another sweep of the learning rate."""
    return {"probe": SweepSettings(**settings)}


PARTS: dict[str, Options] = {
    "no sweep": {"probe": False},
    "no guard": {"guard": False},
    "no displacement limit": method(displacement=None),
    "no floor under weight decay": method(floor=None),
    "no alarm for dying units": {"guard": GuardPolicy(capacity=0.0, bottleneck=0.0)},
    "no alarm for lasting spikes": {"guard": GuardPolicy(spike=1e9)},
    "no unit gradient": method(unit_gradient=False),
    "run ends at its average": method(final_weights=False),
    "no trust": hyper(sure=1e-9),
    "no caution after a divergence": hyper(caution=1.0),
    "hyper steps alike in runs of all lengths": hyper(power=0.0),
    "outer loss at the last iterate": {"average": st.Average(0.0)},
    "no closed forms": {"estimator": st.Trace(stride=4, closed_forms=False)},
    "every step tracked": {"estimator": st.Trace()},
    "γ = 0 (OneStep)": {"estimator": st.OneStep(stride=4)},
    "one pace for all hyperparameters": {"momenta": {"pace": 1.0}},
    "sweep with a margin of 1": sweep(margin=1.0),
    "sweep without interpolation": sweep(interpolation=0.0),
    "fixed hyperparameters, same schedule and average": {"tune": (), "guard": False},
    "every 5": {"every": 5},
    "every 10": {"every": 10},
}
"""A row for each part of the method that settings can remove.

Without the guard there is no displacement limit either.
"""

OTHERS: dict[str, Options] = {
    "sensitivities of all weights": {"tangents": None, "snapshots": "device"},
    "sensitivities of a twentieth of the weights": {"tangents": 1 / 20},
    "average over 12 steps": {"average": st.Average(0.92)},
    "average over 25 steps": {"average": st.Average(0.96)},
    "average over 100 steps": {"average": st.Average(0.99)},
    "average over 200 steps": {"average": st.Average(0.995)},
    "γ = 0.95": {"estimator": st.Trace(0.95, stride=4)},
    "γ = 0.97": {"estimator": st.Trace(0.97, stride=4)},
    "one step of ten tracked": {"estimator": st.Trace(stride=10)},
    "floor of 0.1 under weight decay (L2: 0.01)": floor(decoupled=0.1, l2=0.01),
    "floor of 1 under weight decay (L2: 0.1)": floor(decoupled=1.0, l2=0.1),
    "hyper step 0.3": {"hyper_rate": 0.3},
    "hyper step 0.1": {"hyper_rate": 0.1},
    "hyper step 0.05": {"hyper_rate": 0.05},
    "hyper steps as the inverse of the length": hyper(power=1.0),
    "trust above three times noise": hyper(sure=3.0),
    "quicker moments of the hyper step": hyper(betas=(0.6, 0.9)),
    "longer memory of the trust": hyper(recent=0.9),
    "two validation batches joined": {"joined": 2},
    "four validation batches joined": {"joined": 4},
    "rate climbs from S² of 1.1 to 1.6": limit(random_walk=1.1, drift=1.6),
    "rate climbs from S² of 1.2 to 1.7": limit(random_walk=1.2, drift=1.7),
    "rate climbs from S² of 1.3 to 2": limit(random_walk=1.3, drift=2.0),
    "rate climbs by S² from the first step on": limit(free_share=0.0),
    "sweep at half of its rate": sweep(margin=3.0),
    "sweep at a quarter of its rate": sweep(margin=6.0),
    "momenta at 1.5 times their pace": {"momenta": {"pace": 0.3}},
    "momenta in odds": {"momenta": {"bijection": Logit()}},
    "good weights by means of three": {"guard": GuardPolicy(window=3)},
    "constant schedule": {"schedule": "constant"},
    "cosine schedule": {"schedule": "cosine"},
    "wsd schedule": {"schedule": "wsd"},
    "lr only": {"tune": ("lr",)},
    "lr and weight decay": {"tune": ("lr", "weight_decay")},
}
"""Other values of the same settings."""

ADAM: dict[str, Options] = {
    "β₁'s memory not shortened after the sweep": sweep(least_memory=1e9),
    "β₁ of 0.8 at most after the sweep": sweep(least_memory=5.0, calm=10**9),
    "β₁ of 0.7 at most after the sweep": sweep(least_memory=10 / 3, calm=10**9),
    "β₂ of 0.999, as it is given": {"start": {"beta2": 0.999}},
    "β₂ of 0.98": {"start": {"beta2": 0.98}},
}
"""Changes of what SGD does not have."""

L2: dict[str, Options] = {
    "no stiff directions": method(stiff=StiffSettings(pairs=0)),
}
"""Changes of what there is only where weight decay acts through the gradient."""

CHANGES: dict[str, dict[str, Options]] = {
    "AdamW": {**PARTS, **ADAM, **OTHERS},
    "SGD": {**PARTS, **L2, **OTHERS},
}
"""All changes, by rule."""

DEFAULT = ""
"""The name of no change in saved runs."""

Key = tuple[str, str, str, int]
"""Change, face, workload and seed of a run."""


def paired(runs: Sequence[Run], defaults: Sequence[Run]) -> Ratio:
    """Of validation losses of one workload, from pairs of runs of one seed."""
    logs = [math.log(a.val / b.val) for a, b in zip(runs, defaults, strict=True)]
    known = len(logs) > 1 and all(map(math.isfinite, logs))
    error = statistics.stdev(logs) / len(logs) ** 0.5 if known else math.nan
    return Ratio(statistics.mean(logs), error)


def cells(ratios: Mapping[str, Ratio]) -> tuple[str, str]:
    """The mean change in percent, and on how many workloads the change is better.

    Workloads where a run ended at a loss that is not finite are named, and left out of the mean.
    """
    failed = [n for n, r in ratios.items() if not math.isfinite(r.log)]
    mean = together([r for r in ratios.values() if math.isfinite(r.log)])
    change = f"{100 * mean.log:+.1f}"
    if math.isfinite(mean.error):
        change += f" ± {100 * mean.error:.1f}"
    if failed:
        change += f", not finite: {', '.join(failed)}"
    return change, f"{sum(r.log < 0 for r in ratios.values())} of {len(ratios)}"


def saved(path: Path | None, rule: str) -> Iterator[tuple[Key, Run]]:
    """Runs that were kept, by what they are."""
    if path is None or not path.exists():
        return
    for line in path.read_text().splitlines():
        found = json.loads(line)
        change, run = found.pop("change"), Run(**found)
        if run.rule == rule:
            yield (change, run.face, run.workload, run.seed), run


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", help="by name, separated by ;")
    parser.add_argument("--face", choices=(*FACES, "both"), default="both")
    parser.add_argument("--rule", choices=tuple(STARTS), default="AdamW")
    parser.add_argument("--suite", choices=SUITES, default="proof")
    parser.add_argument("--only", help="workloads of either suite, by commas")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", type=Path, help="a file of runs, to be completed")
    args = parser.parse_args(arguments)
    known = CHANGES[args.rule]
    changes = list(known) if args.changes is None else args.changes.split(";")
    names = args.only.split(",") if args.only else list(SUITES[args.suite])
    faces = list(FACES) if args.face == "both" else [args.face]
    listed = [name for suite in SUITES.values() for name in suite]
    for unknown in ({*changes} - {*known}) | ({*names} - {*listed}):
        parser.error(f"{unknown!r} is none of {'; '.join([*known, *listed])}")
    head = [args.rule, *(cell for face in faces for cell in (f"{face}: loss, %", "better on"))]
    print(row(head), row(["---"] * len(head)), sep="\n", flush=True)
    found = dict(saved(args.save, args.rule))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as executor:
        jobs: dict[Key, Future[Run]] = {}
        for change in (DEFAULT, *changes):
            for key in ((change, f, n, s) for f in faces for n in names for s in range(args.seeds)):
                if key not in found:
                    _, face, name, seed = key
                    options = known.get(change, {})
                    jobs[key] = executor.submit(work, name, face, args.rule, seed, **options)

        def runs(change: str, face: str, name: str) -> list[Run]:
            for key in ((change, face, name, seed) for seed in range(args.seeds)):
                if key not in found:
                    found[key] = run = jobs[key].result()
                    if args.save is not None:
                        with args.save.open("a") as file:
                            print(json.dumps({"change": change, **asdict(run)}), file=file)
            return [found[change, face, name, seed] for seed in range(args.seeds)]

        for change in changes:
            line = [change]
            for face in faces:
                pairs = {n: (runs(change, face, n), runs(DEFAULT, face, n)) for n in names}
                line += cells({n: paired(*pair) for n, pair in pairs.items()})
            print(row(line), flush=True)


if __name__ == "__main__":
    main()
