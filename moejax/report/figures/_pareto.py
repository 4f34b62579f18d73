"""Three trade-offs, each with the front that no other strategy beats."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._data import NotDrawnError, ReportData
from .._palette import GRID, look
from .._summary import pareto_front, speedup
from ._canvas import Mark, byte_unit, label_beside, new_figure, percent_axis


def pareto_memory(data: ReportData) -> Figure:
    """Speedup against device memory at the smallest batch.

    Raises:
      NotDrawnError: The run has neither `on_demand` nor `lru` to compare with.
    """
    gains = _speedups(data)
    sizes = {cell.key.strategy: cell.memory_bytes.mean for cell in data.cells(_batch(data))}
    unit = byte_unit(list(sizes.values()))
    points = {name: (sizes[name] / unit.size, gain) for name, gain in gains.items()}
    figure, axes = _scatter(points)
    axes.set_xlabel(f"device memory for experts ({unit.name})")
    axes.set_ylabel(f"speedup over {data.baseline} (times), batch {_batch(data)}")
    return figure


def pareto_complexity(data: ReportData) -> Figure:
    """Speedup against the complexity score that the reference study gives a strategy.

    Raises:
      NotDrawnError: There is nothing to compare with, or no strategy has a score.
    """
    gains = _speedups(data)
    scores = {entry["id"]: entry["complexity"] for entry in data.claims["strategies"].values()}
    points = {name: (scores[name], gain) for name, gain in gains.items() if name in scores}
    if not points:
        raise NotDrawnError("the reference study scores none of these strategies")
    figure, axes = _scatter(points, x_limit=10.0)
    axes.set_xlabel("implementation complexity (the reference study's score, 1 to 10)")
    axes.set_ylabel(f"speedup over {data.baseline} (times), batch {_batch(data)}")
    return figure


def pareto_efficiency(data: ReportData) -> Figure:
    """Hit ratio against device memory at the smallest batch."""
    cells = data.cells(_batch(data))
    unit = byte_unit([cell.memory_bytes.mean for cell in cells])
    points = {
        cell.key.strategy: (cell.memory_bytes.mean / unit.size, cell.hit_ratio.mean)
        for cell in cells
    }
    figure, axes = _scatter(points)
    percent_axis(axes.yaxis)
    axes.set_xlabel(f"device memory for experts ({unit.name})")
    axes.set_ylabel(f"hit ratio, batch {_batch(data)}")
    return figure


def _batch(data: ReportData) -> int:
    return data.run.batch_sizes[0]


def _speedups(data: ReportData) -> dict[str, float]:
    baseline = data.baseline
    found = {
        cell.key.strategy: speedup(data.summary, cell.key.strategy, baseline, *cell.key[1:])
        for cell in data.cells(_batch(data))
    }
    return {name: one.mean for name, one in found.items() if one is not None}


def _scatter(
    points: dict[str, tuple[float, float]], x_limit: float | None = None
) -> tuple[Figure, Axes]:
    figure = new_figure(3.2)
    axes = figure.subplots()
    names = list(points)
    x, y = np.array([points[name] for name in names]).T
    on_front = pareto_front(x, y)
    order = np.flatnonzero(on_front)[np.lexsort((y[on_front], x[on_front]))]
    axes.step(x[order], y[order], where="post", color=GRID, linewidth=4, zorder=0)
    for index, name in enumerate(names):
        chosen = look(name)
        axes.plot(
            x[index],
            y[index],
            chosen.marker,
            color=chosen.colour if on_front[index] else "white",
            markeredgecolor=chosen.colour,
            markeredgewidth=1.2,
            clip_on=False,
            zorder=3,
            markersize=9 if chosen.marker == "*" else 7,
        )
    axes.set_xlim(0, x_limit or max(x.max(), 1e-9) * 1.25)
    top = max(y.max(), 1e-9)
    axes.set_ylim(-0.03 * top, 1.12 * top)
    label_beside(figure, axes, [Mark(*points[name], name) for name in names])
    return figure, axes
