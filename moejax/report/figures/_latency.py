"""Step latency against batch size."""

from matplotlib.figure import Figure

from .._data import ReportData
from ._canvas import (
    draw_batch_lines,
    label_right,
    log_axis,
    new_figure,
    strategy_legend,
    time_unit,
)


def latency(data: ReportData) -> Figure:
    """Mean step latency, one panel a dispatch on one log axis, error bars 1 sigma over runs."""
    cells = data.summary.cells.values()
    times = [cell.latency_s.mean for cell in cells]
    unit = time_unit(times)
    dispatches = data.run.dispatches
    figure = new_figure(3.4 if len(dispatches) == 1 else 3.6)
    panels = figure.subplots(1, len(dispatches), sharey=True, squeeze=False)[0]
    for axes, dispatch in zip(panels, dispatches, strict=True):
        axes.set_yscale("log")
        marks = draw_batch_lines(axes, data, lambda cell: cell.latency_s, unit, dispatch=dispatch)
        if len(dispatches) > 1:
            axes.set_title(dispatch)
        else:
            label_right(figure, axes, marks)
    log_axis(panels[0].yaxis, times)
    panels[0].set_ylabel(f"step latency ({unit.name})")
    if len(dispatches) > 1:
        strategy_legend(figure, data.run.strategies)
    return figure
