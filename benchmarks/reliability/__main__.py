"""Runs that are made to go wrong: starts, wrong calls, kills, files in trouble, many logs.

    python -m benchmarks.reliability [starts ordinary calls kills searches processes files logged]
        [--starts 1000] [--ordinary 100] [--kills 100] [--searches 100] [--processes 20]
        [--files 100] [--logged 200]

Without names all parts are run. Printed are a row for every question of ``docs/reliability.md``
with what is asked and what is now, and with ``--worst N`` some runs behind each. Losses are of
examples that neither trained nor tuned; a run is worse where its loss is more than 1.1 times the
other one. Plain training against itself on other batches shows what is chance.
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
from benchmarks.reliability.files import files
from benchmarks.reliability.kills import kills
from benchmarks.reliability.logged import growth
from benchmarks.reliability.ranks import ranks
from benchmarks.reliability.searches import searches
from benchmarks.reliability.servers import ABSENT, servers
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


def count(what: str, asked: str, wrong: Sequence[object], of: int, worst: int) -> None:
    """A row of how many are wrong, and some of them."""
    print(row([what, asked, f"{len(wrong)} of {of}"]), flush=True)
    for one in wrong[:worst]:
        print(f"    {one}")


def starts(args: argparse.Namespace) -> None:
    """Hostile starts."""
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
    line("… plain on other batches: worse than plain", "–", known,
         lambda e: worse(e.again, e.plain), 0)  # fmt: skip
    line("… ours: worse than both plain runs", "–", known,
         lambda e: worse(e.ours, e.plain) and worse(e.ours, e.again), 0)  # fmt: skip


def ordinary_starts(args: argparse.Namespace) -> None:
    """Ordinary ones."""
    runs = [(s, "optimizer") for s in SHELLS[:4]] + [(s, "tuner") for s in ("SGD", "AdamW")]
    for shell, driver in runs if args.ordinary else ():
        some = ends(list(ordinary(args.ordinary, shell, driver)), args.workers)
        line(f"ordinary starts, {shell}, {driver}: worse than plain", "0", some,
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


def wrong_calls(args: argparse.Namespace) -> None:
    """Every argument with values that cannot be."""
    verdicts = [(str(c), c.verdict()) for c in calls()]
    bad = [f"{call}: {verdict}" for call, verdict in verdicts if verdict]
    count("wrong calls: obscure or accepted", "0", bad, len(verdicts), args.worst)


def killed(args: argparse.Namespace) -> None:
    """Runs that are killed and resumed, and their curves."""
    found = kills(args.kills)
    other = [k for k in found if not k.same]
    count("killed runs: not bit for bit the whole run", "0", other, len(found), args.worst)
    holes = [k for k in found if k.wrong]
    count("… curves with missing, doubled or other points", "0", holes, len(found), args.worst)


def searched(args: argparse.Namespace) -> None:
    """Searches that are killed and called again."""
    found = searches(args.searches)
    lost = [s for s in found if s.lost]
    count("killed searches: more lost than the running trial", "0", lost, len(found), args.worst)


def ended(args: argparse.Namespace) -> None:
    """Ranks and workers that are killed, and connections that are cut."""
    found = ranks(args.processes)
    other = [k for k in found if not k.same]
    count("killed ranks: not bit for bit the whole run", "0", other, len(found), args.worst)
    more = [k for k in found if k.lost is not None and k.lost > k.most]
    count("… more lost than the failed step (or sweep)", "0", more, len(found), args.worst)
    deaf = [k for k in found if not k.noticed]
    count("… whose other rank went on waiting", "0", deaf, len(found), args.worst)
    killed = "killed workers of a search on PostgreSQL: more lost than the running trial"
    cut = "… connections cut: more lost than the running trials"
    if ABSENT:
        print(row([killed, "0", ABSENT]), row([cut, "0", ABSENT]), sep="\n", flush=True)
        return
    kills, cuts = servers(args.processes)
    count(killed, "0", [k for k in kills if k.lost], len(kills), args.worst)
    count(cut, "0", [c for c in cuts if c.lost], len(cuts), args.worst)


def troubled(args: argparse.Namespace) -> None:
    """Files in trouble."""
    found = files(args.files)
    bad = [f"{c.file}, {c.trouble}: {v}" for c, v in found if v]
    count("files: neither kept nor refused by a sentence", "0", bad, len(found), args.worst)


def many(args: argparse.Namespace) -> None:
    """Logged runs in one process."""
    more = growth(args.logged)
    kept = f"{more.threads:+d}, {more.descriptors:+d}, {more.megabytes:+.1f} MB"
    what = f"{args.logged} logged runs in a process: threads, descriptors, memory"
    print(row([what, "0, 0, ≤ +3 MB", kept]), flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "starts": starts,
    "ordinary": ordinary_starts,
    "calls": wrong_calls,
    "kills": killed,
    "searches": searched,
    "processes": ended,
    "files": troubled,
    "logged": many,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument("--ordinary", type=int, default=100)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--searches", type=int, default=100)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--logged", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worst", type=int, default=0)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.parts) - PARTS.keys())
    if unknown:
        parser.error(f"parts={unknown} must be some of {[*PARTS]}")
    print(row(["what", "asked", "now"]), row(["---"] * 3), sep="\n", flush=True)
    for name, part in PARTS.items():
        if name in args.parts or not args.parts:
            part(args)


if __name__ == "__main__":
    main()
