"""Where the time of a step goes."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .._data import ReportData
from .._palette import INK, look
from ._canvas import Unit, new_figure, strategy_axis, time_unit

_PARTS = (
    ("compute, link idle", 0.25, ""),
    ("compute, link busy (transfer hidden)", 0.6, "////"),
    ("stall (transfer not hidden)", 1.0, ""),
)
_NUM_COLUMNS = 3


def stall_breakdown(data: ReportData) -> Figure:
    """Compute, hidden transfer and stall of a step by strategy, one panel a batch size."""
    batch_sizes = data.run.batch_sizes
    num_columns = min(_NUM_COLUMNS, len(batch_sizes))
    num_rows = math.ceil(len(batch_sizes) / num_columns)
    figure = new_figure(0.7 + num_rows * (0.6 + 0.19 * len(data.run.strategies)))
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, batch_size in zip(panels.flat, batch_sizes, strict=False):
        _bars(axes, data, batch_size)
    for axes in panels.flat[len(batch_sizes) :]:
        axes.set_visible(False)
    handles = [
        Patch(facecolor=INK, alpha=alpha, hatch=hatch, edgecolor="white", label=label)
        for label, alpha, hatch in _PARTS
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _bars(axes: Axes, data: ReportData, batch_size: int) -> None:
    strategies = data.run.strategies
    cells = data.cells(batch_size)
    unit = time_unit([cell.compute_s.mean + cell.stall_s.mean for cell in cells])
    for cell in cells:
        row = strategies.index(cell.key.strategy)
        hidden = cell.hidden_transfer_s
        parts = (cell.compute_s.mean - hidden, hidden, cell.stall_s.mean)
        _bar(axes, row, parts, unit, look(cell.key.strategy).colour)
    strategy_axis(axes, strategies)
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_title(f"batch {batch_size}")
    axes.set_xlabel(f"per step ({unit.name})")


def _bar(axes: Axes, row: int, parts_s: tuple[float, ...], unit: Unit, colour: str) -> None:
    left = 0.0
    for part_s, (_, alpha, hatch) in zip(parts_s, _PARTS, strict=True):
        width = part_s / unit.size
        axes.barh(
            row,
            width,
            left=left,
            height=0.62,
            color=colour,
            alpha=alpha,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.3,
        )
        left += width
    axes.text(left, row, f" {left:#.3g}".rstrip("."), va="center", fontsize=6.5)
