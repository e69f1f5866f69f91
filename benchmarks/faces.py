"""The two faces of the library on the suite of the proof: drop-in optimizers and the tuner.

Both train the same models on the same batches, for as many steps, from the same hyperparameters,
tuned on validation batches in the same order: ``st.AdamW`` or ``st.SGD`` in a loop of one's own,
as in ``benchmarks.run``, and ``st.Tuner`` with its defaults, not compiled. Printed are losses over
the whole validation and test set at the weights a run ends with, means over the seeds; ratios of
these means, with the standard error that the logarithms of the ratios seed by seed give them; and
the geometric means of the ratios over workloads.

    SELFTUNE_DATA=... python -m benchmarks.faces [--rule SGD] [--seeds 5] [--only digits,yacht]

``--suite extended`` takes the second list of workloads instead. ``--save FILE`` keeps every run as
a line of JSON; ``--against FILE`` compares each face with the runs of the same seeds kept there,
such as those of an earlier commit.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.proof.drivers import FACES, SPLITS, STARTS, Run, work
from benchmarks.proof.rendering import grid, number
from benchmarks.workloads import SUITES


@dataclass(frozen=True)
class Ratio:
    """Of two mean losses.

    Attributes:
        log: Its logarithm.
        error: The standard error of that; NaN where it is unknown.
    """

    log: float
    error: float

    def __str__(self) -> str:
        if not math.isfinite(self.log):
            return "–" if math.isnan(self.log) else number(math.inf if self.log > 0 else 0.0)
        value = math.exp(self.log)
        error = f" ± {value * self.error:.4f}" if math.isfinite(self.error) else ""
        return f"{value:.4f}{error}"


def ratio(ours: Sequence[Run], others: Sequence[Run], split: str) -> Ratio:
    """Of the mean losses over the seeds that both have, with an error from pairs of runs."""
    a, b = ({r.seed: getattr(r, split) for r in runs} for runs in (ours, others))
    shared = sorted(a.keys() & b.keys())
    means = [sum(losses[s] for s in shared) for losses in (a, b)]
    if not shared or not math.isfinite(means[1]):
        return Ratio(math.nan, math.nan)
    if not math.isfinite(means[0]):
        return Ratio(math.inf, math.nan)
    logs = [math.log(a[s] / b[s]) for s in shared]
    error = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
    return Ratio(math.log(means[0] / means[1]), error)


def together(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean."""
    if not ratios:
        return Ratio(math.nan, math.nan)
    error = math.sqrt(sum(r.error**2 for r in ratios)) / len(ratios)
    return Ratio(statistics.mean(r.log for r in ratios), error)


def mean(runs: Sequence[Run], split: str) -> str:
    """The mean loss."""
    return number(statistics.mean(getattr(r, split) for r in runs)) if runs else "–"


def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def compared(runs: Sequence[Run], earlier: Sequence[Run], names: Sequence[str], face: str) -> str:
    """The table of a face's present runs against its earlier ones."""
    ratios: dict[str, list[Ratio]] = {split: [] for split in SPLITS}
    rows = []
    for name in names:
        now, then = ([r for r in rs if (r.workload, r.face) == (name, face)]
                     for rs in (runs, earlier))  # fmt: skip
        shared = {r.seed for r in now} & {r.seed for r in then}
        if not shared:
            continue
        for split in SPLITS:
            ratios[split].append(ratio(now, then, split))
        rows.append([name, str(len(shared)), *(str(ratios[s][-1]) for s in SPLITS)])
    rows.append(["geometric mean", "", *(str(together(ratios[s])) for s in SPLITS)])
    return grid([f"{face}: present / saved", "seeds", "val", "test"], rows)


def load(path: Path) -> list[Run]:
    """Runs that were saved."""
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="proof")
    parser.add_argument("--only", help="workloads of either suite, by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rule", choices=list(STARTS), default="AdamW")
    parser.add_argument("--faces", default=",".join(FACES), help="by commas")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", type=Path, help="a file for all runs, written anew")
    parser.add_argument("--against", type=Path, help="a file of runs saved before")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else list(SUITES[args.suite])
    faces = args.faces.split(",")
    known = [name for suite in SUITES.values() for name in suite]
    for unknown in ({*names} - {*known}) | ({*faces} - {*FACES}):
        parser.error(f"{unknown} is none of {', '.join([*known, *FACES])}")
    earlier = [] if args.against is None else load(args.against)
    earlier = [r for r in earlier if r.rule == args.rule]
    head = [args.rule]
    head += [f"{split}, {what}" for split in SPLITS for what in (*FACES, "tuner / optimizer")]
    print(row(head), row(["---"] * len(head)), sep="\n", flush=True)
    runs: list[Run] = []
    ratios: dict[str, list[Ratio]] = {split: [] for split in SPLITS}
    spawn = multiprocessing.get_context("spawn")
    file = nullcontext() if args.save is None else args.save.open("w")
    with file as saved, ProcessPoolExecutor(args.workers, mp_context=spawn) as executor:
        jobs = {
            n: [executor.submit(work, n, f, args.rule, s) for s in range(args.seeds) for f in faces]
            for n in names
        }
        for name, results in jobs.items():
            by_face: dict[str, list[Run]] = {face: [] for face in FACES}
            for result in results:
                run = result.result()
                by_face[run.face].append(run)
                runs.append(run)
                if saved is not None:
                    print(json.dumps(asdict(run)), file=saved, flush=True)
            cells = [name]
            for split in SPLITS:
                ratios[split].append(ratio(by_face["tuner"], by_face["optimizer"], split))
                cells += [*(mean(by_face[f], split) for f in FACES), str(ratios[split][-1])]
            print(row(cells), flush=True)
    means = [cell for split in SPLITS for cell in ("", "", together(ratios[split]))]
    print(row(["geometric mean", *means]), flush=True)
    for face in faces if args.against is not None else []:
        print("\n" + compared(runs, earlier, names, face), flush=True)


if __name__ == "__main__":
    main()
