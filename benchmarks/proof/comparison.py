"""Compares methods over workloads: ranks, verdicts, ratios and times to a target."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.proof.scoring import best_of, middle, rank, time_to
from benchmarks.proof.searches import COSINE, FAMILIES, LION, MUON
from benchmarks.proof.training import Record

OURS = "selftune"
PEERS = (
    "nadamw", "ademamix", "prodigy", "schedule-free", "d-adaptation", "mechanic", "ali-g",
    "ultimate-optimizer",
)  # fmt: skip
COMPARED = (OURS, "default", COSINE, LION, MUON, *PEERS)
TARGET = 10
"""The target of the time-to-target profiles: this percentage of the pool is better."""

Table = dict[str, list[Record]]


def by_workload(records: Iterable[Record]) -> dict[str, Table]:
    """Records by workload and method, in order of seeds, with the best of every family."""
    found: dict[str, Table] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record.workload][record.method].append(record)
    for table in found.values():
        for runs in table.values():
            runs.sort(key=lambda r: r.seed)
        for family, members in FAMILIES.items():
            groups = {m: table.get(m, []) for m in members}
            if all(groups.values()):
                table[family] = best_of(groups, family)
    return {name: dict(table) for name, table in found.items()}


def losses(runs: Sequence[Record], split: str = "val") -> list[float]:
    """Of every run."""
    return [r.own[split] for r in runs]


def ranks(tables: dict[str, Table], method: str) -> dict[str, list[float]]:
    """The ranks of every run of a method, by workload."""
    return {
        name: [rank(loss, losses(table["random"])) for loss in losses(table[method])]
        for name, table in tables.items()
        if table.get("random") and table.get(method)
    }


def versus(ours: Sequence[Record], other: Sequence[Record], split: str) -> str:
    """``better``, ``same`` or ``worse``: differences over shared seeds against their noise."""
    a, b = ({r.seed: r.own[split] for r in runs} for runs in (ours, other))
    differences = [a[s] - b[s] for s in sorted(a.keys() & b.keys())]
    if not all(map(math.isfinite, differences)):
        return "better" if any(math.isinf(b[s]) for s in b) else "worse"
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences))
    error = spread / math.sqrt(max(1, len(differences) - 1) * len(differences))
    if abs(mean) <= 2 * error:
        return "same"
    return "better" if mean < 0 else "worse"


def times(tables: dict[str, Table], parallel: bool = False) -> dict[str, list[float]]:
    """The median time to the target of every compared method, on every workload with a pool.

    Methods without runs on one of these workloads are left out.

    Args:
        tables: Records by workload and method.
        parallel: Whether the trials of a family run at once, so that the time of a seed is that of
            the first trial at the target, as in AlgoPerf's ruleset of external tuning. Otherwise
            the trials run one after another and the time is that of all, up to the share of the run
            at which the trial with the lowest final loss was at the target.
    """
    pools = {name: sorted(losses(t["random"])) for name, t in tables.items() if t.get("random")}
    found: dict[str, list[float]] = {}
    for method in COMPARED:
        if not pools or not all(tables[name].get(method) for name in pools):
            continue
        found[method] = []
        for name, pool in pools.items():
            target = pool[len(pool) * TARGET // 100]
            runs = [[record] for record in tables[name][method]]
            if parallel and method in FAMILIES:
                members = [tables[name][m] for m in FAMILIES[method]]
                runs = [list(trials) for trials in zip(*members, strict=True)]
            found[method].append(middle([min(time_to(r, target) for r in own) for own in runs]))
    return found


def ratios(tables: dict[str, Table], method: str, split: str = "val") -> dict[str, float]:
    """Our median loss over that of another method, by workload."""
    return {
        name: middle(losses(t[OURS], split)) / middle(losses(t[method], split))
        for name, t in tables.items()
        if t.get(OURS) and t.get(method)
    }


def mean_ratio(tables: dict[str, Table], method: str, split: str = "val") -> float:
    """The geometric mean of :func:`ratios` over the workloads where both losses are finite."""
    logs = [math.log(r) for r in ratios(tables, method, split).values() if 0 < r < math.inf]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
