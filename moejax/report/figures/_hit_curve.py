"""Hit ratio against capacity, with published points where there are some for this model."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .._data import NotDrawnError, ReportData
from .._palette import INK, look
from .._published import PUBLISHED_ERROR_RATIO, published_points
from ._canvas import line_look, new_figure, percent_axis


def hit_curve(data: ReportData) -> Figure:
    """Warm hit ratio against slots per layer, lines ours, hollow markers published.

    Raises:
      NotDrawnError: The run has no hit curve.
    """
    curves = data.run.hit_curve
    if not curves:
        raise NotDrawnError("the run has no hit curve")
    figure = new_figure(3.6)
    axes = figure.subplots()
    for strategy, curve in curves.items():
        axes.plot(curve.slots, curve.hit_ratio_warm, **line_look(strategy, has_marker=False))
    published = published_points(data.run.model["name"])
    published = {name: points for name, points in published.items() if name in curves}
    _published(axes, published)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.04)
    percent_axis(axes.yaxis)
    axes.set_xlabel("slots per layer (experts)")
    axes.set_ylabel("hit ratio (warm)")
    handles = [Line2D([], [], label=name, **line_look(name, has_marker=False)) for name in curves]
    if published:
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                markerfacecolor="white",
                color=INK,
                label=f"published, ±{PUBLISHED_ERROR_RATIO:g}",
            )
        )
    axes.legend(handles=handles, loc="lower right")
    return figure


def _published(axes: Axes, points: Mapping[str, Mapping[int, float]]) -> None:
    for strategy, ratios in points.items():
        chosen = look(strategy)
        axes.errorbar(
            list(ratios),
            list(ratios.values()),
            yerr=PUBLISHED_ERROR_RATIO,
            linestyle="",
            marker=chosen.marker,
            markersize=8 if chosen.marker == "*" else 5,
            markerfacecolor="white",
            color=chosen.colour,
            elinewidth=0.8,
        )
