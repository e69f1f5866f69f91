"""What-if pictures: the validation loss predicted around where hyperparameters are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(
    predicted: Mapping[str, tuple[Sequence[float], Sequence[float]]], now: Mapping[str, float]
) -> Figure:
    """A panel for each hyperparameter: predicted loss over its value, the present one marked.

    Args:
        predicted: Values and losses by name.
        now: Present values by name.
    """
    figure, panels = _panels(len(predicted))
    for axes, (name, (values, losses)) in zip(panels, predicted.items(), strict=False):
        axes.plot(values, losses, marker=".")
        axes.axvline(now[name], color="gray", linewidth=1)
        axes.set(xlabel=name, xscale=_scale(values))
    panels[0].set_ylabel("predicted validation loss")
    return figure


def plane(
    names: tuple[str, str],
    values: tuple[Sequence[float], Sequence[float]],
    losses: NDArray[Any],
    course: tuple[Sequence[float], Sequence[float]],
) -> Figure:
    """A map of the predicted loss over two hyperparameters, with the way they have come.

    Args:
        names: Of both.
        values: Of both.
        losses: Shape (values of the first, values of the second).
        course: The values of both so far.
    """
    figure, (axes, *_) = _panels(1)
    drawn = axes.contourf(values[0], values[1], losses.T, levels=12)
    axes.plot(*course, color="white", linewidth=1)
    axes.plot(course[0][-1:], course[1][-1:], marker="o", color="white")
    axes.set(
        xlabel=names[0], ylabel=names[1], xscale=_scale(values[0]), yscale=_scale(values[1]),
        xlim=_ends(values[0]), ylim=_ends(values[1]),
    )  # fmt: skip
    figure.colorbar(drawn, label="predicted validation loss")
    return figure


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with panels in rows of four; drawn without a window."""
    from matplotlib.figure import Figure

    wide, rows = min(count, 4), -(-count // 4)
    figure = Figure(figsize=(4 * wide + 1, 3 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, wide, squeeze=False).flat)


def _scale(values: Sequence[float]) -> str:
    return "log" if min(values) > 0 else "linear"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
