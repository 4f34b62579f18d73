"""Hit ratio against batch size."""

from matplotlib.figure import Figure

from .._data import ReportData
from ._canvas import Unit, draw_batch_lines, label_right, new_figure, percent_axis


def hit_rate(data: ReportData) -> Figure:
    """Share of demanded experts that were resident, error bars 1 sigma over runs."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    marks = draw_batch_lines(axes, data, lambda cell: cell.hit_ratio, Unit(1.0, "ratio"))
    axes.set_ylim(-0.02, 1.02)
    percent_axis(axes.yaxis)
    axes.set_ylabel("hit ratio")
    label_right(figure, axes, marks)
    return figure
