"""Tail latency: percentiles, scaling, consistency."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._data import ReportData
from .._palette import look
from ._canvas import (
    Unit,
    draw_batch_lines,
    from_zero,
    log_axis,
    new_figure,
    percent_axis,
    strategy_axis,
    strategy_legend,
    time_unit,
)


def tail(data: ReportData) -> Figure:
    """Percentiles at the smallest batch; p99 and variation over steps against batch size."""
    figure = new_figure(3.4)
    percentiles, scaling, consistency = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _percentiles(percentiles, data)
    _scaling(scaling, data)
    draw_batch_lines(consistency, data, lambda cell: cell.step_cv_ratio, Unit(1.0, "ratio"))
    from_zero(consistency)
    percent_axis(consistency.yaxis)
    consistency.set_title("c  consistency")
    consistency.set_ylabel("standard deviation / mean over steps")
    strategy_legend(figure, data.run.strategies)
    return figure


def _percentiles(axes: Axes, data: ReportData) -> None:
    smallest = data.run.batch_sizes[0]
    cells = data.cells(smallest)
    unit = time_unit([cell.p99_s.mean for cell in cells])
    for row, cell in enumerate(cells):
        chosen = look(cell.key.strategy)
        p50, p95, p99 = (one.mean / unit.size for one in (cell.p50_s, cell.p95_s, cell.p99_s))
        axes.plot([p50, p99], [row, row], color=chosen.colour, linewidth=1.2)
        axes.plot([p95], [row], "|", color=chosen.colour, markersize=9, markeredgewidth=1.4)
        axes.plot([p99], [row], ">", color=chosen.colour, markersize=4)
        axes.plot([p50], [row], chosen.marker, color=chosen.colour, markersize=6)
    strategy_axis(axes, [cell.key.strategy for cell in cells])
    axes.set_xlim(0.0, 1.06 * axes.get_xlim()[1])
    axes.set_title("a  p50 (marker), p95 (|), p99 (>)")
    axes.set_xlabel(f"step latency at batch {smallest} ({unit.name})")


def _scaling(axes: Axes, data: ReportData) -> None:
    times = [cell.p99_s.mean for cell in data.summary.cells.values()]
    unit = time_unit(times)
    axes.set_yscale("log")
    draw_batch_lines(axes, data, lambda cell: cell.p99_s, unit)
    log_axis(axes.yaxis, times)
    axes.set_title("b  scaling")
    axes.set_ylabel(f"p99 step latency ({unit.name})")
