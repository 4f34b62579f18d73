"""Paper, axes and labels that all figures share: A4 text width, units on axes, no chart junk."""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .._data import ReportData
from .._palette import GRID, INK, look, text_colour
from .._summary import Cell, Estimate

WIDTH_INCHES = 6.7
"""Text width of an A4 page with 2 cm margins."""

_LEGEND_COLUMNS = 5
"""Strategies beside each other that this width holds."""

STYLE = MappingProxyType(
    {
        "font.family": "DejaVu Sans",
        "font.size": 8.0,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "axes.labelsize": 8.0,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "legend.handlelength": 3.2,
        "hatch.linewidth": 0.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "errorbar.capsize": 2.0,
        "savefig.facecolor": "white",
        # Fixed ids: the same run gives the same bytes.
        "svg.hashsalt": "moejax",
    }
)

_LABEL_POINTS = 7.5
_DODGE_OCTAVES = 0.018


class Unit(NamedTuple):
    """How many base units make one of this unit."""

    size: float
    name: str


class Mark(NamedTuple):
    """The point of a strategy that wants its name beside it."""

    x: float
    y: float
    strategy: str


def new_figure(height_inches: float) -> Figure:
    """An empty figure of A4 text width."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def time_unit(times_s: Sequence[float]) -> Unit:
    """The unit in which the largest of these times is at least 1."""
    for unit in (Unit(1.0, "s"), Unit(1e-3, "ms")):
        if max(times_s) >= unit.size:
            return unit
    return Unit(1e-6, "µs")


def byte_unit(sizes: Sequence[float]) -> Unit:
    """GB where the largest of these sizes reaches 1 GB, else MB."""
    return Unit(1e9, "GB") if max(sizes, default=0.0) >= 1e9 else Unit(1e6, "MB")


def draw_batch_lines(
    axes: Axes,
    data: ReportData,
    value: Callable[[Cell], Estimate],
    unit: Unit,
    *,
    dispatch: str | None = None,
    has_interval: bool = False,
) -> list[Mark]:
    """One line a strategy against batch size, error bars 1 sigma over runs or the interval.

    Returns:
      The last point of every line, for `label_right`.
    """
    marks = []
    strategies = data.run.strategies
    for index, strategy in enumerate(strategies):
        cells = data.series(strategy, dispatch)
        if not cells:
            continue
        octaves = _DODGE_OCTAVES * (index - (len(strategies) - 1) / 2)
        x = [cell.key.batch_size * 2**octaves for cell in cells]
        estimates = [value(cell) for cell in cells]
        _draw_estimates(axes, x, estimates, unit, strategy, has_interval=has_interval)
        marks.append(Mark(x[-1], estimates[-1].mean / unit.size, strategy))
    batch_axis(axes, data)
    return marks


def line_look(strategy: str, *, has_marker: bool = True) -> dict[str, Any]:
    """Colour, marker and line of a strategy as matplotlib's keywords."""
    chosen = look(strategy)
    return {
        "color": chosen.colour,
        "marker": chosen.marker if has_marker else "",
        "linestyle": chosen.line,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
        "markersize": 7.5 if chosen.marker == "*" else 5.0,
    }


def batch_axis(axes: Axes, data: ReportData) -> None:
    """A log2 axis with a tick at every batch size of the run and no other."""
    batch_ticks(axes, data.run.batch_sizes)


def batch_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """The same for given batch sizes."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 2**0.35, sizes[-1] * 2**0.35)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlabel("batch size (requests)")


def log_axis(axis: Axis, values: Sequence[float]) -> None:
    """A log axis with plain numbers, denser ticks where the values span little."""
    positive = [value for value in values if value > 0]
    span = max(positive) / min(positive) if positive else 1.0
    subs = (1, 1.5, 2, 3, 4, 5, 7) if span < 8 else (1, 2, 5) if span < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def from_zero(axes: Axes) -> None:
    """Lets the y axis begin at zero and leaves room above the highest point."""
    axes.set_ylim(0.0, 1.06 * axes.get_ylim()[1])


def percent_axis(axis: Axis) -> None:
    """Writes ratios as per cent."""
    axis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{100 * ratio:g} %"))


def strategy_axis(axes: Axes, strategies: Sequence[str]) -> None:
    """Strategies down the y axis, first on top, each name in its colour."""
    axes.set_yticks(range(len(strategies)), strategies)
    axes.set_ylim(len(strategies) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    # Panels that share the axis of their neighbour have no labels of their own.
    for label, strategy in zip(axes.get_yticklabels(), strategies, strict=False):
        label.set_color(text_colour(strategy))
    axes.grid(visible=False, axis="y")


def strategy_legend(figure: Figure, strategies: Sequence[str]) -> None:
    """One legend below all panels, in rows of the same length."""
    handles = [Line2D([], [], label=name, **line_look(name)) for name in strategies]
    num_rows = -(-len(handles) // _LEGEND_COLUMNS)
    columns = -(-len(handles) // num_rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def label_right(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Names in the right margin, moved apart, each with a thin line to its point."""
    _label(figure, axes, marks, 1.035, "left")


def label_beside(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Names beside points: points above each other share one column of names."""
    places = [(_in_axes(axes, mark)[0], mark) for mark in marks]
    columns: list[list[tuple[float, Mark]]] = []
    for place in sorted(places, key=lambda item: item[0]):
        if columns and place[0] - columns[-1][-1][0] < 0.03:
            columns[-1].append(place)
        else:
            columns.append([place])
    for column in columns:
        left, right = column[0][0], column[-1][0]
        is_left = right > 0.87
        x = left - 0.03 if is_left else right + 0.03
        side = "right" if is_left else "left"
        _label(figure, axes, [mark for _, mark in column], x, side)


def _label(figure: Figure, axes: Axes, marks: Sequence[Mark], x: float, side: str) -> None:
    # The panel takes about four fifths of the figure; its final size is not known yet.
    height_points = 72 * figure.get_figheight() * 0.8
    gap = 1.25 * _LABEL_POINTS / height_points
    ordered = sorted(marks, key=lambda mark: mark.y)
    heights = spread_apart([_in_axes(axes, mark)[1] for mark in ordered], gap)
    for mark, height in zip(ordered, heights, strict=True):
        axes.annotate(
            mark.strategy,
            xy=(mark.x, mark.y),
            xytext=(x, height),
            textcoords="axes fraction",
            ha=side,
            va="center",
            color=text_colour(mark.strategy),
            fontsize=_LABEL_POINTS,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": look(mark.strategy).colour,
                "linewidth": 0.5,
                "alpha": 0.7,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.0 if side == "left" else 1.0, 0.5),
            },
        )


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places as little as they need to be at least `gap` apart.

    Returns:
      New places in the same order; a crowd stays centred where it was.
    """
    crowds: list[list[float]] = []
    for place in places:
        crowds.append([place, 1])
        while len(crowds) > 1 and _overlap(crowds[-2], crowds[-1], gap):
            centre, size = crowds.pop()
            before, size_before = crowds[-1]
            total = size + size_before
            crowds[-1] = [(centre * size + before * size_before) / total, total]
    return [
        centre + gap * (index - (size - 1) / 2)
        for centre, size in crowds
        for index in range(int(size))
    ]


def _draw_estimates(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    unit: Unit,
    strategy: str,
    *,
    has_interval: bool = False,
) -> None:
    """One strategy's line in its look."""
    spreads = [_spread(one, has_interval) for one in estimates]
    axes.errorbar(
        x,
        [one.mean / unit.size for one in estimates],
        yerr=[[spread[side] / unit.size for spread in spreads] for side in (0, 1)],
        elinewidth=0.8,
        **line_look(strategy),
    )


def _overlap(below: list[float], above: list[float], gap: float) -> bool:
    return above[0] - below[0] < gap * (above[1] + below[1]) / 2 - 1e-12


def _in_axes(axes: Axes, mark: Mark) -> tuple[float, float]:
    x, y = axes.transAxes.inverted().transform(axes.transData.transform((mark.x, mark.y)))
    return float(x), float(y)


def _spread(one: Estimate, has_interval: bool) -> tuple[float, float]:
    low, high = (one.mean - one.low, one.high - one.mean) if has_interval else (one.std, one.std)
    # NaN, from one run only, draws no bar.
    return (0.0, 0.0) if math.isnan(low) else (max(low, 0.0), max(high, 0.0))
