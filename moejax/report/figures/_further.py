"""What the study left open: what memory buys, what cards give, whether hybrids beat their parts."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .._data import NotDrawnError, ReportData
from .._further import Experiment
from .._hybrids import Judged, judge_hybrids
from .._palette import INK, look
from .._selection import candidates
from ._canvas import (
    byte_unit,
    line_look,
    log_axis,
    new_figure,
    percent_axis,
    strategy_legend,
    time_unit,
)


def sizes(data: ReportData) -> Figure:
    """Step latency against device memory, a line a strategy, at the smallest and largest batch.

    Raises:
      NotDrawnError: The run has no other cache sizes than its own.
    """
    experiment = _experiment(data, "capacities")
    figure = new_figure(3.5)
    panels = _ends(experiment)
    names = data.run.strategies
    for axes, size, letter in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, "ab", strict=False
    ):
        among = candidates(data, size)
        memory = byte_unit([one.memory_bytes for one in among])
        time = time_unit([one.mean_s for one in among])
        for name in names:
            points = sorted(
                (one.memory_bytes / memory.size, one.mean_s / time.size)
                for one in among
                if one.strategy == name
            )
            x, y = zip(*points, strict=True)
            axes.plot(x, y, clip_on=False, **line_look(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_axis(axes.xaxis, [one.memory_bytes / memory.size for one in among])
        log_axis(axes.yaxis, [one.mean_s / time.size for one in among])
        axes.set_xlabel(f"device memory for experts ({memory.name})")
        axes.set_ylabel(f"mean step ({time.name})")
        axes.set_title(f"{letter}  batch {size}")
    strategy_legend(figure, names)
    return figure


def cards(data: ReportData) -> Figure:
    """Tokens a second on every card, with as many experts on it as fit.

    Raises:
      NotDrawnError: The run has no cells of cards.
    """
    experiment = _experiment(data, "gpus")
    order = [card["name"] for card in experiment.facts["cards"]]
    names = [name for name in data.run.strategies if name in experiment.strategies()]
    panels = _ends(experiment)
    figure = new_figure(3.3)
    for axes, size, letter in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, "ab", strict=False
    ):
        for index, name in enumerate(names):
            fitting = experiment.where(strategy=name, batch_size=size, cache="all that fit")
            shift = 0.13 * (index - (len(names) - 1) / 2)
            x = [order.index(cell.head["hardware"]) + shift for cell in fitting]
            rates = [size / cell.mean("latency_s") for cell in fitting]
            axes.plot(x, rates, **line_look(name) | {"linestyle": "", "markersize": 6})
        axes.set_yscale("log")
        log_axis(axes.yaxis, [line for one in axes.lines for line in one.get_ydata()])
        axes.set_xticks(range(len(order)), order, rotation=35, ha="right")
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("tokens/s")
        axes.set_title(f"{letter}  batch {size}")
    strategy_legend(figure, names)
    return figure


def hybrids(data: ReportData) -> Figure:
    """Time of every hybrid beside the best of its parts.

    Raises:
      NotDrawnError: The run has no hybrids, or none of their parts.
    """
    experiment = _experiment(data, "hybrids")
    judged = [one for one in judge_hybrids(data, experiment) if one.part is not None]
    if not judged:
        raise NotDrawnError("the run has none of the hybrids' parts")
    figure = new_figure(3.1)
    panels = _ends(experiment)
    rows = list(dict.fromkeys(one.cell.strategy for one in judged))
    for axes, size, letter in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, "ab", strict=False
    ):
        for one in judged:
            if one.cell.batch_size == size:
                _draw_changes(axes, rows.index(one.cell.strategy), one)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        percent_axis(axes.xaxis)
        axes.set_xlabel("change of the mean step")
        axes.set_title(f"{letter}  batch {size}")
    handles = [
        Line2D(
            [], [], linestyle="", marker=look(part).marker, color=look(part).colour,
            markersize=7, label=f"beside {part}",
        )
        for part in dict.fromkeys(one.part for one in judged if one.part is not None)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _draw_changes(axes: Axes, row: int, one: Judged) -> None:
    """Filled on the run's own machine, hollow on a cautious host, a line between them."""
    assert one.part is not None
    chosen = look(one.part)
    places = [change.ratio for change in one.changes.values()]
    axes.plot(places, [row] * len(places), color=chosen.colour, linewidth=1.2, alpha=0.5)
    for host, change in one.changes.items():
        axes.plot(
            [change.ratio], [row], chosen.marker, color=chosen.colour, markersize=7,
            clip_on=False, markerfacecolor="white" if host == "cautious" else chosen.colour,
        )  # fmt: skip


def _experiment(data: ReportData, name: str) -> Experiment:
    if name not in data.run.further:
        raise NotDrawnError("the run has no further experiments; `moejax bench --full` makes them")
    return data.run.further[name]


def _ends(experiment: Experiment) -> tuple[int, ...]:
    all_sizes = experiment.batch_sizes()
    return tuple(dict.fromkeys((all_sizes[0], all_sizes[-1])))
