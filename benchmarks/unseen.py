"""One self-tuned run against the best of five cosine rates, on workloads not used in development.

    SELFTUNE_DATA=... python -m benchmarks.unseen [--further | --latest] [--all] [--rule SGD]
        [--seeds 3] [--only siamese,burgers×5] [--face optimizer] [--records FILE] [--label NAME]
        [--report]

Baselines are ``torch.optim.AdamW`` (torch's defaults) or ``torch.optim.SGD`` (momentum 0.9) at five
peak rates, annealed to 0 along a cosine, evaluated at their last or their averaged weights,
whichever have the lower validation loss (``benchmarks.proof.training``). Ours are one run of
``st.AdamW`` or ``st.SGD`` (``optimizer``) and one of ``st.Tuner`` (``tuner``), with the same
starting values on all workloads and the same batches and initial weights as the baselines.
``best rate`` is the rate with the lowest validation loss, averaged over seeds; ``by seed`` is the
best of the five runs of each seed. Ratios are ours / baseline of the means over seeds, with the
standard error of the log ratios of single seeds; the last column is the geometric mean of our
final tuned peak rates, divided by the best rate.

``--further`` takes the third list, of ten, and ``--latest`` the fourth, of twelve, which was added
last; ``--all`` adds the fourteen workloads of the proof. A name with ``×N`` is a job N times as
long.
Each run is a line of JSON in ``--records`` (by default in the system's folder for temporary files)
and is not repeated; our runs with another ``--label``, for example of another version, are kept
apart, while baselines are shared. ``--rates`` replaces the five rates, for example if the best one
is the highest or lowest. One run of a workload takes 5 to 30 s on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.faces import Ratio, ratio, row, together
from benchmarks.proof.contenders import Config, Stepping
from benchmarks.proof.drivers import FACES, SPLITS, STARTS, work
from benchmarks.proof.rendering import number
from benchmarks.proof.searches import RATES
from benchmarks.proof.training import Contender, train
from benchmarks.workloads import EXTENDED, FURTHER, LATEST, SUITE, Workload, named

BASELINES = {"AdamW": RATES, "SGD": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
"""Five peak rates, by rule."""
RECORDS = Path(tempfile.gettempdir()) / "selftune-unseen.jsonl"


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        workload: Name of the workload.
        method: ``optimizer``, ``tuner`` or ``cosine`` and the rate.
        rule: ``AdamW`` or ``SGD``.
        seed: Seed of weights and batches.
        label: Label of the version; empty for baselines.
        val: Loss over the whole validation set; infinite if it is not finite.
        test: Loss over the whole test set.
        seconds: Training time.
        lr: Peak learning rate at the end.
    """

    workload: str
    method: str
    rule: str
    seed: int
    label: str
    val: float
    test: float
    seconds: float
    lr: float


@dataclass(frozen=True)
class Setup:
    """Settings of a comparison.

    Attributes:
        rule: ``AdamW`` or ``SGD``.
        label: Label of our runs.
        rates: Peak rates of the baselines; by default the five of the rule.
    """

    rule: str = "AdamW"
    label: str = ""
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.rates:
            object.__setattr__(self, "rates", BASELINES[self.rule])


Job = tuple[str, str, str, int, str]
"""The first five fields of an outcome."""


def cosine(rate: float) -> str:
    """The name of a baseline."""
    return f"cosine {rate:g}"


def fixed(rule: str, rate: float, workload: Workload, model: nn.Module, seed: int) -> Contender:
    """A torch optimizer at its defaults (SGD: momentum 0.9), annealed along a cosine to 0."""
    options = {"momentum": 0.9} if rule == "SGD" else {}
    optimizer = getattr(torch.optim, rule)(model.parameters(), lr=rate, **options)
    shape = Config(schedule="cosine")
    return Stepping(
        workload, model, optimizer, factor=lambda step: shape.factor(step, workload.steps)
    )


def execute(job: Job) -> Outcome:
    """One run."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    name, method, rule, seed, _ = job
    if method in FACES:
        run = work(name, method, rule, seed)
        return Outcome(*job, run.val, run.test, run.seconds, run.ends["lr"])
    rate = float(method.removeprefix("cosine "))
    record = train(named(name), method, partial(fixed, rule, rate), seed, checkpoints=0)
    val, test = (record.own[split] for split in SPLITS)
    return Outcome(*job, val, test, record.seconds, rate)


def load(path: Path) -> list[Outcome]:
    """The outcomes in a file; a truncated last line is removed from it."""
    if not path.exists():
        return []
    whole, _, rest = path.read_text().rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "")
    return [Outcome(**json.loads(line)) for line in whole.splitlines()]


def wanted(
    names: Sequence[str], faces: Sequence[str], setup: Setup, seeds: int, done: Sequence[Outcome]
) -> Iterator[Job]:
    """All requested runs that are not finished: for each seed, all workloads."""
    finished = {(o.workload, o.method, o.rule, o.seed, o.label) for o in done}
    for seed in range(seeds):
        for name in names:
            jobs: list[Job] = [(name, cosine(r), setup.rule, seed, "") for r in setup.rates]
            jobs += [(name, face, setup.rule, seed, setup.label) for face in faces]
            yield from (job for job in jobs if job not in finished)


@dataclass(frozen=True)
class Comparison:
    """One of our drivers compared with the fixed rates, on one workload.

    Attributes:
        seeds: Number of seeds finished by both.
        rate: The rate with the lowest mean validation loss.
        best: Ratio of our loss to that of ``rate``, by split.
        chosen: Ratio of our loss to that of each seed's best run, by split.
        climb: Geometric mean of our final rates, divided by ``rate``.
        means: Mean losses, by split: best rate, rate by seed, ours.
    """

    seeds: int
    rate: float
    best: dict[str, Ratio]
    chosen: dict[str, Ratio]
    climb: float
    means: dict[str, tuple[float, float, float]]


def compare(outcomes: Sequence[Outcome], name: str, face: str, setup: Setup) -> Comparison | None:
    """The comparison over seeds with all runs finished; None if there are none."""
    own = [o for o in outcomes if (o.workload, o.rule) == (name, setup.rule)]
    ours = {o.seed: o for o in own if (o.method, o.label) == (face, setup.label)}
    rates = {r: {o.seed: o for o in own if o.method == cosine(r)} for r in setup.rates}
    shared = sorted(ours.keys() & set.intersection(*(set(runs) for runs in rates.values())))
    if not shared:
        return None
    run = [ours[s] for s in shared]
    fixed_runs = {r: [runs[s] for s in shared] for r, runs in rates.items()}
    rate = min(fixed_runs, key=lambda r: statistics.fmean(o.val for o in fixed_runs[r]))
    best = fixed_runs[rate]
    chosen = [min(one, key=lambda o: o.val) for one in zip(*fixed_runs.values(), strict=True)]
    mean = {
        s: tuple(statistics.fmean(getattr(o, s) for o in runs) for runs in (best, chosen, run))
        for s in SPLITS
    }
    climb = math.exp(statistics.fmean(math.log(o.lr / rate) for o in run))
    return Comparison(
        len(shared), rate, {s: ratio(run, best, s) for s in SPLITS},
        {s: ratio(run, chosen, s) for s in SPLITS}, climb, mean,
    )  # fmt: skip


def report(outcomes: Sequence[Outcome], names: Sequence[str], face: str, setup: Setup) -> str:
    """The table of one driver."""
    head = [f"{setup.rule}, {face}", "seeds", "best rate"]
    for split in SPLITS:
        head += [f"{split}, best rate", "by seed", "ours", "ours / best rate", "ours / by seed"]
    head.append("lr at the end / best rate")
    lines = [row(head), row(["---"] * len(head))]
    found = {name: compare(outcomes, name, face, setup) for name in names}
    complete = {name: c for name, c in found.items() if c is not None}
    for name, c in complete.items():
        cells = [name, c.seeds, f"{c.rate:g}"]
        for split in SPLITS:
            cells += [*map(number, c.means[split]), c.best[split], c.chosen[split]]
        lines.append(row([*cells, f"{c.climb:.2g}"]))
    cells = ["geometric mean", "", ""]
    for split in SPLITS:
        ratios = ([c.best[split] for c in complete.values()],
                  [c.chosen[split] for c in complete.values()])  # fmt: skip
        cells += ["", "", "", *(together(r) for r in ratios)]
    climbs = [math.log(c.climb) for c in complete.values()]
    cells.append(f"{math.exp(statistics.fmean(climbs)):.2g}" if climbs else "–")
    lines.append(row(cells))
    missing = [name for name, c in found.items() if c is None]
    if missing:
        lines.append(f"\nNot finished: {', '.join(missing)}.")
    return "\n".join(lines)


def run(jobs: Sequence[Job], path: Path, workers: int) -> None:
    """Execute jobs, and append each outcome to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(outcome: Outcome, count: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(
            f"{count}/{len(jobs)} {outcome.workload} {outcome.method} {outcome.rule} seed "
            f"{outcome.seed}: val {number(outcome.val)}, {outcome.seconds:.0f} s", flush=True,
        )  # fmt: skip

    if workers == 1:
        for count, job in enumerate(jobs, start=1):
            keep(execute(job), count)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as executor:
        results = as_completed([executor.submit(execute, job) for job in jobs])
        for count, result in enumerate(results, start=1):
            keep(result.result(), count)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--only", default="", help="comma-separated; NAME×5 is 5 times as long")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--further", action="store_true", help="the third list, of ten")
    which.add_argument("--latest", action="store_true", help="the fourth list, of twelve")
    made.add_argument("--all", action="store_true", help="add the fourteen of benchmarks.proof")
    made.add_argument("--face", default=",".join(FACES), help="comma-separated")
    made.add_argument("--rule", choices=list(STARTS), default="AdamW")
    made.add_argument("--rates", default="", help="comma-separated baseline peak rates")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--records", type=Path, default=RECORDS, help="a file of finished runs")
    made.add_argument("--label", default="", help="label of our runs, for example a version")
    made.add_argument("--report", action="store_true", help="only print the tables")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run unfinished jobs, then print the tables."""
    options = parser()
    args = options.parse_args(arguments)
    chosen = LATEST if args.latest else FURTHER if args.further else EXTENDED
    names = args.only.split(",") if args.only else [*chosen, *(SUITE if args.all else ())]
    faces = args.face.split(",")
    for face in {*faces} - {*FACES}:
        options.error(f"--face {face} is unknown: use {', '.join(FACES)}")
    known = [*EXTENDED, *FURTHER, *LATEST, *SUITE]
    for name in {n.partition("×")[0] for n in names} - {*known}:
        options.error(f"--only {name} is unknown: use {', '.join(known)}")
    try:
        rates = tuple(float(rate) for rate in args.rates.split(",") if rate)
    except ValueError:
        options.error(f"--rates {args.rates} is not a list of numbers: use such as 1e-3,1e-2")
    setup = Setup(args.rule, args.label, rates)
    if not args.report:
        jobs = list(wanted(names, faces, setup, args.seeds, load(args.records)))
        run(jobs, args.records, args.workers)
    outcomes = load(args.records)
    for face in faces:
        print(f"\n{report(outcomes, names, face, setup)}")
    print(f"\nRuns: {args.records}")


if __name__ == "__main__":
    main()
