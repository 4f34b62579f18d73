"""Speedup against batch size."""

import functools

from matplotlib.figure import Figure

from .._data import ReportData
from .._palette import FAINT
from .._summary import Cell, Estimate
from .._summary import speedup as speedup_over
from ._canvas import Unit, draw_batch_lines, from_zero, label_right, new_figure


def speedup(data: ReportData) -> Figure:
    """Mean latency of the baseline divided by the strategy's, with its 95 % interval.

    Raises:
      NotDrawnError: The run has neither `on_demand` nor `lru` to compare with.
    """
    baseline = data.baseline
    figure = new_figure(3.2)
    axes = figure.subplots()
    marks = draw_batch_lines(
        axes,
        data,
        functools.partial(_against, data, baseline),
        Unit(1.0, "times"),
        has_interval=True,
    )
    axes.axhline(1.0, color=FAINT, linewidth=0.8, zorder=0)
    from_zero(axes)
    axes.set_ylabel(f"speedup over {baseline} (times)")
    label_right(figure, axes, marks)
    return figure


def _against(data: ReportData, baseline: str, cell: Cell) -> Estimate:
    found = speedup_over(data.summary, cell.key.strategy, baseline, *cell.key[1:])
    return found or Estimate(*[float("nan")] * 4)
