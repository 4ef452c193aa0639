"""Plots of accuracies, curves and matrices; each a matplotlib `Figure`, written as PNG or SVG.

Where `can_plot` is false, nothing else here works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from tars_fast.evaluation.metrics import Curve
from tars_fast.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

ACCURACY_PLOT = "accuracy.png"
DRIFT_PLOT = "drift.png"
CKA_PLOT = "cka.png"
_COLOURS = {"speech": "#c06030", "text": "#4878a8"}
_MORE_COLOURS = ("#c06030", "#4878a8", "#5a8f4a", "#8a5a9f", "#7a7a7a", "#b8912b")
_UNKNOWN_COLOUR = "#dddddd"
_PHONE_WIDTH = 4.4
"""Inches: at this width a 9 point label is still legible on a phone, which shows the picture at about its own size."""
_MOST_COLUMNS = 3
_STYLE: dict[Any, object] = {
    # Users choose names of data: a dollar sign in one begins no formula.
    "text.parse_math": False,
    # Text stays text: the file is smaller, and the reader's browser chooses the font.
    "svg.fonttype": "none",
    # Names inside the file are random otherwise: the same run gives the same bytes.
    "svg.hashsalt": "tars_fast",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

P = ParamSpec("P")
T = TypeVar("T")


def can_plot() -> bool:
    """Whether matplotlib is installed; without it there are no plots, and nothing else changes."""
    return find_spec("matplotlib") is not None


def _styled(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function under `_STYLE`, some of which counts when a plot is made, some when it is written."""

    @wraps(function)
    def inside(*arguments: P.args, **named: P.kwargs) -> T:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return function(*arguments, **named)

    return inside


@_styled
def write_png(path: Path, figure: Figure) -> None:
    """Raises CannotWriteError."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_atomically(path, file.getvalue())


@_styled
def as_svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


@_styled
def accuracy_plot(panels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """A panel for each data set, in it a pair of bars, speech and text, for each evaluation, with 95 % intervals.

    Args:
        panels: data set -> evaluation ("before", "after") -> its report.
    """
    figure, axes = _panels(panels, height=3.4, y_label="accuracy, %, with 95 % interval")
    for axis, reports in zip(axes, panels.values(), strict=True):
        for shift, (modality, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
            for place, report in enumerate(reports.values()):
                height = 100 * report[f"{modality}_accuracy"]
                low, high = (100 * end for end in report[f"{modality}_accuracy_ci95"])
                axis.bar(place + shift, height, 0.38, color=colour, label=None if place else modality)
                # Rounding can put an end of the interval on the wrong side of the figure.
                reach = [[max(0, height - low)], [max(0, high - height)]]
                axis.errorbar(place + shift, height, reach, color="black", capsize=3)
        axis.set(ylim=(0, 105), xticks=range(len(reports)), xticklabels=list(reports))
    _legend(figure, axes, columns=2)
    return figure


@_styled
def curves_plot(panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str, order: Sequence[str] = ()) -> Figure:
    """Lines, their intervals as bands; one legend for all panels, in which a name stands for the same line everywhere.

    Args:
        panels: title -> name -> curve.
        order: names that have the first colours, so that they are the same in several plots.
    """
    figure, axes = _panels(panels, height=3.0, y_label=y_label, x_label=x_label)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    places = list(dict.fromkeys([*order, *names]))
    for axis, curves in zip(axes, panels.values(), strict=True):
        for name, curve in curves.items():
            number = places.index(name)
            colour = _MORE_COLOURS[number % len(_MORE_COLOURS)]
            # Lines differ in more than their colour.
            style = ("-", "--", ":", "-.")[number % 4]
            thin = curve.thinned()
            marker = "." if len(thin.x) <= 40 else None
            axis.plot(thin.x, _numbers(thin.y), style, color=colour, label=name, marker=marker, linewidth=1.3)
            if thin.low is not None and thin.high is not None:
                axis.fill_between(thin.x, _numbers(thin.low), _numbers(thin.high), color=colour, alpha=0.2, linewidth=0)
        _whole_numbers(axis.xaxis)
        axis.grid(alpha=0.3)
    _legend(figure, axes, columns=2 if len(names) == 4 or max(map(len, names)) > 15 else min(len(names), 3))
    return figure


@_styled
def heat_map_plot(
    panels: Mapping[str, Sequence[Sequence[float | None]]], x_label: str, y_label: str, colour_label: str
) -> Figure:
    """Values from 0 to 1, grey where nothing is known, the first row at the bottom; rows and columns count from 1.

    Args:
        panels: title -> matrix.
    """
    from matplotlib import colormaps

    figure, axes = _panels(panels, height=3.6, y_label=y_label, x_label=x_label)
    colours = colormaps["viridis"].with_extremes(bad=_UNKNOWN_COLOUR)
    for axis, matrix in zip(axes, panels.values(), strict=True):
        values = np.ma.masked_invalid(np.array(matrix, dtype=np.float64))
        num_rows, num_columns = values.shape
        extent = (0.5, num_columns + 0.5, 0.5, num_rows + 0.5)
        shown = axis.imshow(values, origin="lower", extent=extent, vmin=0, vmax=1, cmap=colours, interpolation="nearest")
        _whole_numbers(axis.xaxis)
        _whole_numbers(axis.yaxis)
    figure.colorbar(shown, ax=axes, label=colour_label)
    return figure


def _panels(titles: Collection[str], height: float, y_label: str, x_label: str = "") -> tuple[Figure, list[Axes]]:
    """A figure and the axes of each title, as wide as a phone shows each, their y axes the same."""
    from matplotlib.figure import Figure

    columns = min(len(titles), _MOST_COLUMNS)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(_PHONE_WIDTH * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    axes = axes[: len(titles)]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel=x_label)
    for row in grid:
        row[0].set_ylabel(y_label)
    return figure, axes


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    lines = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), frameon=False, loc="outside lower center", ncols=columns)


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Values as matplotlib takes them, with nan in the place of None."""
    return [math.nan if value is None else value for value in values]


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
