"""Writes ``RESULTS.md`` and its plots from records."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import torch

from benchmarks.proof.comparison import (
    COMPARED,
    OURS,
    PEERS,
    TARGET,
    Table,
    by_workload,
    losses,
    mean_ratio,
    ranks,
    ratios,
    times,
    versus,
)
from benchmarks.proof.scoring import TAU, interval, middle, noise, profile
from benchmarks.proof.searches import COSINE
from benchmarks.proof.training import Record

ELSEWHERE = ("torchopt", "tpe", "tpe+asha")
"""Too dear for every workload."""

LONGER = "×"
"""In the name of a workload that is made longer."""


def number(value: float) -> str:
    """Three or four digits, or ∞."""
    return f"{value:.4g}" if math.isfinite(value) else "∞"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pool_table(tables: dict[str, Table]) -> str:
    """One run in the pool: rank, loss, regret and cost."""
    rows = []
    random = ranks(tables, "selftune-random")
    for name, own in ranks(tables, OURS).items():
        table = tables[name]
        pool = losses(table["random"])
        best = min(table["random"], key=lambda r: r.own["val"])
        known = min(r.own["val"] for runs in table.values() for r in runs)
        ours = table[OURS]
        low, high = interval(own)
        starts = random.get(name, [])
        rows.append([
            name, f"{number(min(pool))} / {number(best.own['test'])}", number(middle(pool)),
            f"{number(middle(losses(ours)))} / {number(middle(losses(ours, 'test')))}",
            f"{middle(own):.0f} ({low:.0f}…{high:.0f})",
            f"{100 * (middle(losses(ours)) / known - 1):+.1f}",
            f"{middle(starts):.0f} / {max(starts):.0f}" if starts else "–",
        ])  # fmt: skip
    head = ["workload", "pool's best, val / test", "pool's median", "one run, val / test",
            "rank in % (90 %)", "regret in %", "random starts: rank, median / worst"]  # fmt: skip
    return grid(head, rows)


def long_table(tables: dict[str, Table]) -> str:
    """Runs that are five times as long: our rank in a small pool, and losses of some methods."""
    methods = [OURS, "default", COSINE, "prodigy", "schedule-free"]
    rows = []
    for name, own in ranks(tables, OURS).items():
        table = tables[name]
        pool = losses(table["random"])
        cells = [name, f"{len(pool)}", number(min(pool)), f"{middle(own):.0f}"]
        for method in methods:
            runs = table.get(method, [])
            pair = (number(middle(losses(runs, s))) for s in ("val", "test")) if runs else "–"
            cells.append(" / ".join(pair))
        rows.append(cells)
    return grid(["workload", "pool", "its best", "rank in %", *methods], rows)


def method_table(tables: dict[str, Table], split: str) -> str:
    """The median loss of every method on every workload; the lowest is bold."""
    methods = [*COMPARED, *ELSEWHERE]
    rows = []
    for name, table in tables.items():
        cells = {m: middle(losses(table[m], split)) for m in methods if table.get(m)}
        if OURS not in cells:
            continue
        best = min(cells.values())
        shown = {
            m: f"{number(v)} ± {number(noise(table[m], split))}"
            if len(table[m]) > 1 and math.isfinite(v)
            else number(v)
            for m, v in cells.items()
        }
        rows.append([name] + [
            f"**{shown[m]}**" if cells.get(m) == best else shown.get(m, "–") for m in methods
        ])  # fmt: skip
    return grid(["workload", *methods], rows)


def accuracy_table(tables: dict[str, Table]) -> str:
    """Test accuracies in percent."""
    rows = []
    for name, table in tables.items():
        if OURS in table and "test_accuracy" in table[OURS][0].own:
            cells = [
                f"{100 * middle(losses(table[m], 'test_accuracy')):.1f}" if table.get(m) else "–"
                for m in COMPARED
            ]
            rows.append([name, *cells])
    return grid(["workload", *COMPARED], rows)


def common_table(tables: dict[str, Table]) -> str:
    """Validation losses at the running average that is the same for all."""
    rows = []
    for name, table in tables.items():
        cells = [
            number(middle([r.average["val"] for r in table[m]])) if table.get(m) else "–"
            for m in COMPARED
        ]
        rows.append([name, *cells])
    return grid(["workload", *COMPARED], rows)


def versus_table(tables: dict[str, Table]) -> str:
    """How often one run is better, the same or worse than each competitor, and mean ratios."""
    rows = []
    for method in COMPARED[1:]:
        if not ratios(tables, method):
            continue
        cells = [method]
        # One shared seed has no standard error, so it gives no verdict.
        repeated = [
            t
            for t in tables.values()
            if len({r.seed for r in t.get(method, [])} & {r.seed for r in t.get(OURS, [])}) > 1
        ]
        for split in ("val", "test"):
            verdicts = [versus(t[OURS], t[method], split) for t in repeated]
            counts = [verdicts.count(v) for v in ("better", "same", "worse")]
            cells.append(" / ".join(map(str, counts)))
        cells += [f"{mean_ratio(tables, method, split):.3f}" for split in ("val", "test")]
        rows.append(cells)
    head = ["one run against", "validation: better / same / worse", "test",
            "ratio of losses, validation", "test"]  # fmt: skip
    return grid(head, rows)


def cost_table(tables: dict[str, Table]) -> str:
    """Gradient evaluations and wall time, against a plain run's."""
    rows = []
    for name, table in tables.items():
        if not (table.get(OURS) and table.get("default")):
            continue
        plain = table["default"]
        cells = [name]
        for method in (OURS, *PEERS):
            runs = table.get(method)
            if not runs:
                cells.append("–")
                continue
            parts = (
                middle([getattr(r, what) for r in runs]) / middle([getattr(r, what) for r in plain])
                for what in ("gradients", "seconds")
            )
            cells.append(" / ".join(f"{r:.2f}" for r in parts))
        rows.append(cells)
    return grid(["workload", OURS, *PEERS], rows)


def summary(tables: dict[str, Table]) -> str:
    """The figures asked for, beside those measured."""
    own = {n: middle(r) for n, r in ranks(tables, OURS).items()}
    starts = ranks(tables, "selftune-random")
    rows = []
    if own:
        worst = max(own, key=lambda n: own[n])
        low, high = interval(list(own.values()))
        rows += [
            ["rank of one run in the pool, median of workloads", "≤ 3 %",
             f"{middle(list(own.values())):.1f} % ({low:.0f}…{high:.0f})"],
            ["worst workload", "≤ 15 %", f"{own[worst]:.0f} % ({worst})"],
        ]  # fmt: skip
    if starts:
        every = [r for runs in starts.values() for r in runs]
        failed = sum(
            not math.isfinite(r.own["val"]) for t in tables.values()
            for r in t.get("selftune-random", [])
        )  # fmt: skip
        rows.append([
            "random starts over four decades: median / worst", "≤ 8 % / ≤ 40 %, none fails",
            f"{middle(every):.0f} % / {max(every):.0f} %, {failed} of {len(every)} fail",
        ])  # fmt: skip
    if ratios(tables, "tpe+asha"):
        told = []
        for split, name in (("val", "validation"), ("test", "test")):
            found = list(ratios(tables, "tpe+asha", split).values())
            low, high = interval(found)
            told.append(f"{name} {middle(found):.3f} ({low:.3f}…{high:.3f})")
        rows.append([
            "loss over that of TPE with pruning, 50 trials, median of workloads", "≤ 1",
            ", ".join(told),
        ])  # fmt: skip
    return grid(["figure", "asked", "measured"], rows) + "\n\n" + versus_table(tables)


def score_table(tables: dict[str, Table]) -> str:
    """Time-to-target scores, with trials of a family one after another and at once."""
    found = times(tables)
    scores = profile(found) if found else {}
    at_once = profile(times(tables, parallel=True)) if found else {}
    rows = [
        [m, f"{s:.2f}", f"{at_once[m]:.2f}", str(sum(math.isfinite(t) for t in found[m]))]
        for m, s in sorted(scores.items(), key=lambda item: -item[1])
    ]
    reached = f"targets reached, of {len(next(iter(found.values()), []))}"
    return grid(["method", "score", "score, trials in parallel", reached], rows)


def plot(tables: dict[str, Table], path: Path) -> None:
    """Performance profiles and ranks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    found = times(tables)
    taus = [TAU[0] + i * (TAU[1] - TAU[0]) / 100 for i in range(101)]
    fastest = [min(column) for column in zip(*found.values(), strict=True)]
    for method, own in found.items():
        shares = [
            sum(
                math.isfinite(t) and t <= tau * b for t, b in zip(own, fastest, strict=True)
            ) / len(own)
            for tau in taus
        ]  # fmt: skip
        left.plot(taus, shares, label=method, linewidth=2.5 if method == OURS else 1)
    left.set(xlabel="τ: time to the target, against the fastest", ylabel="share of workloads")
    if found:
        left.legend(fontsize=7, loc="center right", bbox_to_anchor=(1.0, 0.75))
    own, starts = ranks(tables, OURS), ranks(tables, "selftune-random")
    for place, name in enumerate(own):
        right.plot(own[name], [place] * len(own[name]), "o", color="tab:blue")
        right.plot(starts.get(name, []), [place] * len(starts.get(name, [])), "|", color="tab:red")
    right.set_yticks(range(len(own)), list(own), fontsize=7)
    right.set(xlabel="rank in the pool in %: from defaults (o), from random starts (|)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def render(records: Iterable[Record], path: Path) -> None:
    """Write the page and its plot beside it."""
    everything = by_workload(records)
    long = {n: t for n, t in everything.items() if LONGER in n}
    tables = {n: t for n, t in everything.items() if n not in long}
    picture = path.with_suffix(".png")
    plot(tables, picture)
    template = Template(Path(__file__).with_name("template.md").read_text())
    page = template.substitute(
        machine=f"torch {torch.__version__}, {platform.machine()} CPU",
        summary=summary(tables), picture=picture.name, pool=pool_table(tables),
        validation=method_table(tables, "val"), test=method_table(tables, "test"),
        accuracy=accuracy_table(tables), common=common_table(tables), target=TARGET,
        score=score_table(tables), cost=cost_table(tables), long=long_table(long),
    )  # fmt: skip
    path.write_text(page)
