"""Compares records: ranks, regrets, costs, times to a target; pure functions of numbers."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.proof.training import Record

Runs = Sequence[Record]
TAU = (1.0, 4.0)


def rank(loss: float, pool: Sequence[float]) -> float:
    """The percentage of the pool that is strictly better.

    Examples:
        >>> rank(2.5, [1.0, 2.0, 3.0, 4.0])
        50.0
    """
    if not math.isfinite(loss):
        return 100.0
    return 100 * sum(other < loss for other in pool) / len(pool)


def middle(values: Sequence[float]) -> float:
    """The median; infinite if that is."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def interval(
    values: Sequence[float],
    of: Callable[[Sequence[float]], float] = middle,
    draws: int = 1000,
    share: float = 0.9,
) -> tuple[float, float]:
    """A bootstrapped interval of a statistic."""
    source = random.Random(0)
    found = sorted(of(source.choices(values, k=len(values))) for _ in range(draws))
    return found[int((1 - share) / 2 * draws)], found[int((1 + share) / 2 * draws) - 1]


def time_to(record: Record, target: float) -> float:
    """Gradient evaluations until the validation loss is at most the target; infinite if never.

    Examples:
        >>> curve = [(0.5, 2.0), (1.0, 1.0)]
        >>> time_to(Record("w", "m", 0, {}, {}, curve, gradients=120), 1.5)
        120.0
    """
    reached = [share for share, loss in record.curve if loss <= target]
    return reached[0] * record.gradients if reached else math.inf


def profile(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The score of each method: the area under its performance profile over τ in [1, 4].

    A method's profile at τ is the share of workloads on which it takes at most τ times the time of
    the fastest; 1 is the highest score, and a missed target counts as infinite time.

    Args:
        times: A time for every workload, by method.

    Source: Dahl et al. 2023 (AlgoPerf), section 4; Dolan & Moré 2002.

    Examples:
        >>> profile({"a": [1.0, 1.0], "b": [2.5, math.inf]})
        {'a': 1.0, 'b': 0.25}
    """
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    low, high = TAU
    scores = {}
    for method, own in times.items():
        area = 0.0
        for time, best in zip(own, fastest, strict=True):
            if math.isfinite(time):
                area += max(0.0, high - max(low, time / best)) / (high - low)
        scores[method] = area / len(fastest)
    return scores


def best_of(groups: Mapping[str, Runs], name: str) -> list[Record]:
    """For every seed, the best on validation of several methods, at the cost of all."""
    found = []
    for runs in zip(*(sorted(g, key=lambda r: r.seed) for g in groups.values()), strict=True):
        best = min(runs, key=lambda r: r.own["val"])
        cost = sum(r.gradients for r in runs)
        found.append(
            Record(best.workload, name, best.seed, best.own, best.average, best.curve, cost,
                   sum(r.seconds for r in runs), best.ends)
        )  # fmt: skip
    return found


def noise(runs: Runs, key: str = "val") -> float:
    """The standard error of the mean over seeds."""
    values = [r.own[key] for r in runs]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
