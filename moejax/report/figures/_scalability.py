"""What a larger batch costs and gives: four panels."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._data import ReportData
from .._summary import Cell, Estimate
from ._canvas import (
    Unit,
    draw_batch_lines,
    from_zero,
    log_axis,
    new_figure,
    strategy_legend,
    time_unit,
)


def scalability(data: ReportData) -> Figure:
    """Latency, throughput, hit ratio per GB and experts fetched against batch size."""
    figure = new_figure(5.4)
    panels = figure.subplots(2, 2, sharex=True)
    _latency(panels[0, 0], data)
    draw_batch_lines(
        panels[0, 1], data, lambda cell: cell.throughput_tokens_per_s, Unit(1.0, "tokens/s")
    )
    panels[0, 1].set_title("b  throughput")
    panels[0, 1].set_ylabel("decoded tokens per second")
    draw_batch_lines(panels[1, 0], data, lambda cell: cell.hit_ratio_per_gb, Unit(0.01, "%"))
    panels[1, 0].set_title("c  hits per device memory")
    panels[1, 0].set_ylabel("hit ratio per GB (% / GB)")
    draw_batch_lines(panels[1, 1], data, _fetched(data), Unit(1.0, "experts"))
    panels[1, 1].set_title("d  experts fetched")
    panels[1, 1].set_ylabel("experts fetched per step")
    for axes in panels.flat[1:]:
        from_zero(axes)
    for axes in panels[0]:
        axes.set_xlabel("")
    strategy_legend(figure, data.run.strategies)
    return figure


def _latency(axes: Axes, data: ReportData) -> None:
    times = [cell.latency_s.mean for cell in data.summary.cells.values()]
    unit = time_unit(times)
    axes.set_yscale("log")
    draw_batch_lines(axes, data, lambda cell: cell.latency_s, unit)
    log_axis(axes.yaxis, times)
    axes.set_title("a  latency")
    axes.set_ylabel(f"step latency ({unit.name})")


def _fetched(data: ReportData) -> Callable[[Cell], Estimate]:
    expert_bytes = data.run.model["expert_bytes"]

    def experts(cell: Cell) -> Estimate:
        return Estimate(*(value / expert_bytes for value in cell.fetched_bytes))

    return experts
