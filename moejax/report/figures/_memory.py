"""Device memory by strategy."""

from matplotlib.figure import Figure

from .._data import ReportData
from .._palette import FAINT, look
from ._canvas import byte_unit, new_figure, strategy_axis


def memory(data: ReportData) -> Figure:
    """Device bytes for experts, from the smallest to the largest batch size, by strategy."""
    strategies = data.run.strategies
    rows = [data.series(strategy) for strategy in strategies]
    unit = byte_unit([cell.memory_bytes.mean for cells in rows for cell in cells])
    figure = new_figure(0.9 + 0.24 * len(strategies))
    axes = figure.subplots()
    for row, (strategy, cells) in enumerate(zip(strategies, rows, strict=True)):
        values = [cell.memory_bytes.mean / unit.size for cell in cells]
        if not values:
            continue
        chosen = look(strategy)
        axes.plot(values, [row] * len(values), color=chosen.colour, linewidth=2.5, alpha=0.45)
        axes.plot(values, [row] * len(values), chosen.marker, color=chosen.colour, markersize=6)
        axes.annotate(
            _range(min(values), max(values), unit.name),
            (max(values), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    capacity = max(cell.capacity_bytes for cells in rows for cell in cells) / unit.size
    axes.axvline(capacity, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        "capacity of the slots",
        (capacity, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 2),
        textcoords="offset points",
        ha="right",
        color=FAINT,
        fontsize=7,
    )
    strategy_axis(axes, strategies)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.18)
    axes.set_xlabel(f"device memory for experts ({unit.name})")
    return figure


def _range(low: float, high: float, unit: str) -> str:
    texts = [f"{value:#.3g}".rstrip(".") for value in (low, high)]
    return f"{texts[0]} {unit}" if texts[0] == texts[1] else f"{texts[0]} to {texts[1]} {unit}"
