"""Runs that are made to go wrong: hostile and ordinary starts, and wrong calls.

    python -m benchmarks.reliability [--starts 1000] [--ordinary 100]

Printed are a row for every question of ``docs/reliability.md`` with what is asked and what was
found, and with ``--worst N`` the worst runs of each. Losses are of examples that neither trained
nor tuned; a run is worse where its loss is more than 1.1 times the other one. Plain training
against itself on other batches shows what is chance.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from benchmarks.faces import row
from benchmarks.reliability.calls import calls
from benchmarks.reliability.starts import SHELLS, End, Start, hostile, ordinary, quiet, run

WORSE = 1.1


def worse(a: float, b: float) -> bool:
    """Whether a loss is worse than another; what is not finite is."""
    return not a <= WORSE * b if math.isfinite(b) else False


def ends(starts: Sequence[Start], workers: int) -> list[End]:
    """All runs, in processes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=quiet) as executor:
        return list(executor.map(run, starts, chunksize=4))


def line(
    what: str, asked: str, found: Sequence[End], bad: Callable[[End], bool], worst: int
) -> None:
    """A row, and the worst runs behind it."""
    those = [e for e in found if bad(e)]
    share = 100 * len(those) / max(1, len(found))
    print(row([what, asked, f"{len(those)} of {len(found)} ({share:.1f} %)"]), flush=True)
    for end in sorted(those, key=lambda e: -(e.ours / (e.initial or 1)))[:worst]:
        print(f"    {end}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument("--ordinary", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worst", type=int, default=0)
    args = parser.parse_args(arguments)
    print(row(["what", "asked", "found"]), row(["---"] * 3), sep="\n", flush=True)
    found = ends(list(hostile(args.starts)), args.workers)
    told = [e for e in found if e.start.told != "nothing"]
    untold = [e for e in found if e.start.told == "nothing"]
    known = [e for e in found if not math.isnan(e.plain)]
    line("hostile starts: not finite", "0", found, lambda e: not e.finite, args.worst)
    line("worse than the initial weights, losses told", "0", told,
         lambda e: worse(e.ours, e.initial), args.worst)  # fmt: skip
    line("worse than the initial weights, none told", "≤ 1 %", untold,
         lambda e: worse(e.ours, e.initial), args.worst)  # fmt: skip
    line("worse than plain torch from the same start", "≤ 3 %", known,
         lambda e: worse(e.ours, e.plain), args.worst)  # fmt: skip
    for shell in SHELLS[:4]:
        if args.ordinary:
            some = ends(list(ordinary(args.ordinary, shell)), args.workers)
            line(f"ordinary starts, {shell}: worse than plain", "0", some,
                 lambda e: worse(e.ours, e.plain), args.worst)  # fmt: skip
            line("… above twice", "0", some, lambda e: e.ours > 2 * e.plain, args.worst)
            line("… plain on other batches: worse than plain", "–", some,
                 lambda e: worse(e.again, e.plain), 0)  # fmt: skip
            line("… above twice", "–", some, lambda e: e.again > 2 * e.plain, 0)
            logs = [math.log(e.ours / e.plain) for e in some if math.isfinite(e.ours)]
            mean = math.exp(statistics.mean(logs))
            error = mean * statistics.stdev(logs) / math.sqrt(len(logs))
            print(row(["… mean ratio to plain", "–", f"{mean:.2f} ± {error:.2f}"]), flush=True)
            line("… a tenth more dead units", "0", some,
                 lambda e: e.live[1] < e.live[0] - 0.1, args.worst)  # fmt: skip
    verdicts = [(str(c), c.verdict()) for c in calls()]
    bad = [v for v in verdicts if v[1]]
    print(row(["wrong calls: obscure or accepted", "0", f"{len(bad)} of {len(verdicts)}"]))
    for call, verdict in bad[: args.worst]:
        print(f"    {call}: {verdict}")


if __name__ == "__main__":
    main()
