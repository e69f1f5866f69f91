"""Runs the proof: every method on every workload, resumed where it stopped, and the table.

    SELFTUNE_DATA=... python -m benchmarks.run --suite small [--methods selftune,prodigy,random]

Finished runs lie in ``benchmarks/records``, a line of JSON each, and are not run again;
``--again METHOD`` forgets those of a method, on the workloads of ``--only``. ``--suite full`` adds
images and text at five times the length. ``--suite extended`` (the second list of workloads) and
``--suite slice`` (one short workload) have records and results of their own
(``benchmarks/records/extended``, ``benchmarks/RESULTS-extended.md``). ``--report`` only writes
``benchmarks/RESULTS.md``. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.proof.comparison import by_workload
from benchmarks.proof.rendering import render
from benchmarks.proof.scoring import middle
from benchmarks.proof.searches import RUNNERS, seeds
from benchmarks.proof.training import Record
from benchmarks.workloads import EXTENDED, LONG, SLICE, SUITE, named

FOLDER = Path("benchmarks/records")
SUITES = {"slice": SLICE, "small": SUITE, "full": {**SUITE, **LONG}, "extended": EXTENDED}

APART = ("slice", "extended")
"""Suites with records and a page of their own."""


def records(folder: Path = FOLDER) -> list[Record]:
    """All finished runs."""
    lines = (
        line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    )
    return [Record(**json.loads(line)) for line in lines]


def work(name: str, method: str, seed: int) -> Record:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return RUNNERS[method](named(name), seed)


def keep(record: Record, folder: Path) -> None:
    """Append a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{record.workload}.jsonl").open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def forget(methods: set[str], names: list[str], folder: Path) -> None:
    """Drop the runs of some methods on some workloads."""
    for name in names:
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if json.loads(line)["method"] not in methods]
        if len(kept) < len(lines):
            partial = path.with_suffix(".partial")  # an interruption loses no run
            partial.write_text("".join(kept))
            partial.replace(path)


def chosen(args: argparse.Namespace) -> list[str]:
    """The suite's workloads, or those of them that ``--only`` names."""
    suite = SUITES[args.suite]
    return [name for name in suite if name in (args.only.split(",") if args.only else suite)]


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Every run asked for that is not finished."""
    done = {(r.workload, r.method, r.seed) for r in records(args.records)}
    for name in chosen(args):
        for method in args.methods.split(","):
            for seed in seeds(method, args.seeds, args.pool, args.starts, args.searches):
                if (name, method, seed) not in done:
                    yield name, method, seed


def check(found: list[Record]) -> None:
    """Exit with an error unless one run beats the default and half of the pool, on the test set.

    Raises:
        SystemExit: It does not, or runs are missing.
    """
    for name, table in by_workload(found).items():
        ours, default, pool = (
            [r.own["test"] for r in table.get(m, [])] for m in ("selftune", "default", "random")
        )
        if not (ours and default and pool):
            raise SystemExit(f"{name}: --check needs runs of selftune, default and random")
        if not middle(ours) < min(middle(default), middle(pool)):
            raise SystemExit(
                f"{name}: test loss {middle(ours):.4g}, default {middle(default):.4g}, median of "
                f"the pool {middle(pool):.4g}"
            )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="small")
    parser.add_argument("--methods", default=",".join(RUNNERS), help="names, by commas")
    parser.add_argument("--only", default="", help="workloads, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pool", type=int, default=100, help="random-search runs")
    parser.add_argument("--starts", type=int, default=10, help="random starts of ours")
    parser.add_argument("--searches", type=int, default=3, help="searches by TPE with pruning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", default="", help="methods whose runs to forget, by commas")
    parser.add_argument("--records", type=Path, help="a folder of finished runs")
    parser.add_argument("--results", type=Path, help="the page to write")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument(
        "--check", action="store_true", help="fail unless selftune beats default and random"
    )
    return parser


def main() -> None:
    """Run what is missing, then write the table."""
    options = parser()
    args = options.parse_args()
    known = {"methods": RUNNERS, "again": RUNNERS, "only": SUITES[args.suite]}
    for option, names in known.items():
        for name in filter(None, getattr(args, option).split(",")):
            if name not in names:
                options.error(f"--{option} {name} is unknown: use {', '.join(names)}")
    apart = args.suite if args.suite in APART else ""
    args.records = args.records or FOLDER / apart
    args.results = args.results or FOLDER.parent / f"RESULTS{'-' if apart else ''}{apart}.md"
    if args.again:
        forget(set(args.again.split(",")), chosen(args), args.records)
    if not args.report:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=spawn) as executor:
            runs = [executor.submit(work, *one) for one in wanted(args)]
            for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
                keep(run.result(), args.records)
    found = records(args.records)
    render(found, args.results)
    if args.check:
        check(found)


if __name__ == "__main__":
    main()
