"""Pages of TensorBoard's Custom Scalars: losses, health, and a page for each family."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from selftune.hparams import FAMILIES
from selftune.monitor.axes import LOG10, WHEN

STRENGTHS = "Strengths"
SET_BY_EVENTS = "Rates and momenta"
"""The page of hyperparameters that the sweep and rewinds set."""
LOSSES = {
    "Loss/final": "final loss, if the run ended there",
    "Loss/val": "loss of validation batches",
    "Loss/train": "loss of training batches",
    "Loss/gap": "gap: validation minus training",
    "outer/averaged-vs-last": "validation loss: averaged minus last weights",
}
HEALTH = {
    "weights/displacement": "displacement ratio of the weights",
    "response/agreement": "agreement of predicted and realised change",
    "time/overhead": "share of time spent tuning",
}


class Chart(NamedTuple):
    """A chart of lines, or of values with margins.

    Attributes:
        title: Title of the chart.
        lines: Tags of lines.
        series: Tags of value, lower and upper end, logged at the same steps.
    """

    title: str
    lines: tuple[str, ...] = ()
    series: tuple[tuple[str, str, str], ...] = ()


def family(name: str) -> str:
    """The page of a hyperparameter."""
    return next((page for page, names in FAMILIES.items() if name in names), STRENGTHS)


def layout(tags: Collection[str]) -> dict[str, list[Chart]]:
    """Pages and their charts, without empty charts.

    A chart is identical in all runs that have it, so TensorBoard shows it once.

    Args:
        tags: Tags of the scalars logged so far.

    Examples:
        >>> pages = layout(["Loss/val", "margin/lr/low", "log10/lr"])
        >>> [c.title for c in pages["Rates and momenta"]]
        ['lr (log10), events marked']
    """
    pages = {"Loss": [Chart(title, (tag,)) for tag, title in LOSSES.items() if tag in tags]}
    others = sorted(t for t in tags if re.match("Loss/|score/", t) and t not in LOSSES)
    pages["Loss"] += [Chart(tag, (tag,)) for tag in others]
    matched = (re.fullmatch("margin/(.+)/low", tag) for tag in tags)
    names = sorted((m[1] for m in matched if m), key=_place)
    for page in (*FAMILIES, STRENGTHS):
        pages[page] = [_values(n, f"{LOG10}/{n}" in tags) for n in names if family(n) == page]
    pages["Health"] = [Chart(title, (tag,)) for tag, title in HEALTH.items() if tag in tags]
    ratios = {n: f"hypergrad/{n}/snr" for n in names}
    pages["Health"] += [
        Chart(f"{n}: signal-to-noise ratio", (tag,)) for n, tag in ratios.items() if tag in tags
    ]
    return {page: charts for page, charts in pages.items() if charts}


def _values(name: str, logarithmic: bool) -> Chart:
    """The chart of a hyperparameter, with the events that set it.

    One tag marks events of all kinds; the dashboard would report further tags as missing in runs
    without them.
    """
    value = f"{LOG10}/{name}" if logarithmic else f"hyper/{name}"
    title, series = name, [(value, f"margin/{name}/low", f"margin/{name}/high")]
    if logarithmic:
        title += " (log10)"
    if family(name) == SET_BY_EVENTS:
        title += ", events marked"
        series.append((f"{WHEN}/{name}",) * 3)
    return Chart(title, series=tuple(series))


def _place(name: str) -> tuple[int, str]:
    """Hyperparameters of the update in their order, then the others by name."""
    known = [n for names in FAMILIES.values() for n in names]
    return known.index(name) if name in known else len(known), name
