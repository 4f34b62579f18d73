"""One page: what every strategy costs and gives."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._data import ReportData
from .._palette import look
from .._summary import Cell, Estimate
from ._canvas import Unit, byte_unit, new_figure, strategy_axis, time_unit


def overview(data: ReportData) -> Figure:
    """Latency, tail, hits, traffic and memory side by side, a row a strategy."""
    smallest, largest = data.run.batch_sizes[0], data.run.batch_sizes[-1]
    cells = data.cells(smallest)
    columns = [
        _times(f"latency\nbatch {smallest}", [cell.latency_s for cell in cells]),
        _times(f"p99 latency\nbatch {smallest}", [cell.p99_s for cell in cells]),
        (f"hit ratio\nbatch {smallest}", Unit(0.01, "%"), [cell.hit_ratio for cell in cells]),
        _sizes(f"fetched per step\nbatch {smallest}", [cell.fetched_bytes for cell in cells]),
        _sizes("device memory\nfor experts", [cell.memory_bytes for cell in cells]),
    ]
    last = data.cells(largest)
    if smallest != largest and len(last) == len(cells):
        title = f"latency\nbatch {largest}"
        columns.insert(1, _times(title, [cell.latency_s for cell in last]))
    figure = new_figure(1.0 + 0.27 * len(cells))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (title, unit, values) in zip(panels, columns, strict=True):
        _column(axes, cells, title, unit, values)
    return figure


def _times(title: str, values: Sequence[Estimate]) -> tuple[str, Unit, Sequence[Estimate]]:
    return title, time_unit([one.mean for one in values]), values


def _sizes(title: str, values: Sequence[Estimate]) -> tuple[str, Unit, Sequence[Estimate]]:
    return title, byte_unit([one.mean for one in values]), values


def _column(
    axes: Axes, cells: Sequence[Cell], title: str, unit: Unit, values: Sequence[Estimate]
) -> None:
    largest = max(one.mean for one in values) / unit.size or 1.0
    for row, (cell, one) in enumerate(zip(cells, values, strict=True)):
        mean, colour = one.mean / unit.size, look(cell.key.strategy).colour
        axes.barh(row, mean, height=0.5, color=colour)
        axes.text(mean + 0.04 * largest, row, f"{mean:#.3g}".rstrip("."), va="center", fontsize=7)
    strategy_axis(axes, [cell.key.strategy for cell in cells])
    axes.set_xlim(0, 1.45 * largest)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(f"{title} ({unit.name})", fontsize=7.5)
