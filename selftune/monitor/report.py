"""The final report of a run: a table for the terminal and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

log = logging.getLogger("selftune")

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""
MOST = 40
"""Maximum number of rows of a table: the hyperparameters that changed most."""


@dataclass(frozen=True)
class Line:
    """A row of the report.

    Attributes:
        name: Name of the hyperparameter.
        start: Its first value.
        end: Its last value.
        moved: First and last step of the middle 90 % of its change, or None.
        verdict: Its verdict.
    """

    name: str
    start: float
    end: float
    moved: tuple[int, int] | None
    verdict: str


def line(name: str, curve: Curve, verdict: str) -> Line:
    """A row from the course of a hyperparameter.

    Examples:
        >>> line("lr", ([0, 10, 20, 30], [0.1, 0.1, 0.4, 0.4]), "lr has settled").moved
        (10, 20)
    """
    steps, values = curve
    scaled = [math.log(v) if v > 0 else v for v in values]
    lengths = [abs(b - a) for a, b in pairwise(scaled)]
    total, way, moved = sum(lengths), 0.0, None
    if total > 1e-9:
        first = last = 0
        for at, length in enumerate(lengths):
            if way <= 0.05 * total:
                first = at
            way += length
            last = at + 1
            if way >= 0.95 * total:
                break
        moved = (int(steps[first]), int(steps[last]))
    return Line(name, values[0], values[-1], moved, verdict)


def table(lines: Sequence[Line]) -> str:
    """The rows as text; if there are very many, those with the largest changes."""
    shown = sorted(lines, key=_way, reverse=True)[:MOST] if len(lines) > MOST else list(lines)
    rows = [("hyperparameter", "start", "end", "moved", "verdict")]
    for one in shown:
        moved = "–" if one.moved is None else f"{one.moved[0]}…{one.moved[1]}"
        rows.append((one.name, f"{one.start:.3g}", f"{one.end:.3g}", moved, one.verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    text = "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )
    hidden = len(lines) - len(shown)
    return text + (f"\n… and {hidden} more that changed less" if hidden else "")


def _way(one: Line) -> float:
    if one.start > 0 and one.end > 0:
        return abs(math.log(one.end / one.start))
    return abs(one.end - one.start)


def page(
    title: str,
    lines: Sequence[Line],
    panels: Mapping[str, Mapping[str, Curve]],
    why: str = "",
    events: Sequence[int] = (),
) -> str:
    """A self-contained HTML page.

    Args:
        title: Heading of the page.
        lines: Rows of the table.
        panels: Curves by name, by the title of their plot.
        why: Explanations of the values, one line each.
        events: Steps of the rewinds, marked in every plot.
    """
    head = "".join(f"<th>{c}</th>" for c in ("", "start", "end", "moved", "verdict"))
    body = "".join(
        f"<tr><td>{html.escape(one.name)}</td><td>{one.start:.4g}</td><td>{one.end:.4g}</td>"
        f"<td>{'–' if one.moved is None else f'{one.moved[0]}…{one.moved[1]}'}</td>"
        f"<td>{html.escape(one.verdict)}</td></tr>"
        for one in lines
    )
    reasons = "".join(f"<li>{html.escape(line)}</li>" for line in why.splitlines())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto;color:#222}"
        "td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ddd}"
        "img{width:48%;margin:.5%}</style>"
        f"<h1>{html.escape(title)}</h1><table><tr>{head}</tr>{body}</table>"
        + (f"<h2>Origin of each value</h2><ul>{reasons}</ul>" if why else "")
        + "".join(_image(name, curves, events) for name, curves in panels.items())
        + "</html>\n"
    )


def _image(title: str, curves: Mapping[str, Curve], events: Sequence[int]) -> str:
    """A plot as an embedded image, or a remark if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>No plots: <code>pip install matplotlib</code> (extra <code>report</code>).</p>"
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name)
    for step in events:
        first = "rewind" if step == events[0] else None
        axes.axvline(step, color="gray", linestyle=":", label=first)
    positive = all(v > 0 for _, values in curves.values() for v in values if math.isfinite(v))
    axes.set(title=title, xlabel="step", yscale="log" if positive else "linear")
    if len(curves) > 1 or events:
        axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    coded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{coded}">'
