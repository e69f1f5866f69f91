"""What-if pictures: the predicted validation loss around the current hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT = 18
"""Font size in points; TensorBoard shows pictures at about half their size."""


def curve(name: str, values: Sequence[float], losses: Sequence[float], now: float) -> Figure:
    """The predicted loss over the values of a hyperparameter, with the current one marked.

    Args:
        name: Name of the hyperparameter.
        values: Its values.
        losses: Predicted loss at each of them.
        now: Its current value.
    """
    figure, axes = _panel()
    axes.plot(values, losses, marker="o", linewidth=2)
    axes.axvline(now, color="gray", linestyle="--", linewidth=2)
    axes.set(xlabel=f"{name} (dashed: {now:.3g}, now)", ylabel="predicted validation loss")
    _scale(axes.xaxis, values)
    axes.yaxis.set_major_locator(_few())
    return figure


def plane(
    names: tuple[str, str],
    values: tuple[Sequence[float], Sequence[float]],
    losses: NDArray[Any],
    course: tuple[Sequence[float], Sequence[float]],
) -> Figure:
    """A map of the predicted loss over two hyperparameters, with their history.

    Args:
        names: Names of both.
        values: Values of both.
        losses: Shape (values of the first, values of the second).
        course: Previous values of both.
    """
    figure, axes = _panel()
    drawn = axes.contourf(values[0], values[1], losses.T, levels=12)
    axes.plot(*course, color="white", linewidth=2)
    axes.plot(course[0][-1:], course[1][-1:], marker="o", markersize=10, color="white")
    axes.set(xlabel=f"{names[0]} (point: now)", ylabel=names[1])
    _scale(axes.xaxis, values[0])
    _scale(axes.yaxis, values[1])
    bar = figure.colorbar(drawn, ticks=_few())
    bar.set_label("predicted validation loss", size=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return figure


def _panel() -> tuple[Figure, Any]:
    """A figure with one panel, drawn without a window, with text legible at half the size."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": FONT}):
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        return figure, figure.subplots()


def _scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for positive values, with labels at its ends and middle."""
    from matplotlib.ticker import NullFormatter

    name, scale = axis.axis_name, "log" if min(values) > 0 else "linear"
    axis.axes.set(**{f"{name}scale": scale, f"{name}lim": (min(values), max(values))})
    shown = [values[0], values[len(values) // 2], values[-1]]
    axis.set_ticks(shown, labels=[f"{v:.2g}" for v in shown])
    axis.set_minor_formatter(NullFormatter())


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)
