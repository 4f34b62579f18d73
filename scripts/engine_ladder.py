"""The ladder in the report on the engine: predicted, simulated and measured steps side by side."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from moejax.bench import PARTS
from moejax.report._palette import GRID, INK, LOOKS
from moejax.units import format_ratio, format_seconds

Row: TypeAlias = dict[str, Any]
Table: TypeAlias = Callable[[Sequence[str], Sequence[Sequence[Any]], str], str]

MARKERS = {1: "o", 4: "s", 16: "^"}
LAWS = {
    "predicted": "closed form of the counts",
    "simulated": "timeline",
    "roofline": "baseline: roofline of the datasheet",
    "two_constants": "baseline: rates of memory and link only",
}


def ladder_section(results: Row, table: Table) -> list[str]:
    """The section as Markdown; empty where a run has no ladder."""
    rows, summary = results.get("ladder", []), results.get("ladder_summary", {})
    if not summary.get("num_cases"):
        return []
    head = ("strategy", "slots", "batch", "routing", "fit", "predicted", "90 % interval")
    head = (*head, "timeline", "measured", "error", "counts equal")
    return [
        "## Predicted, simulated, measured",
        f"The profile below was fitted to the cases marked so; the {summary['num_cases']} others "
        "judge it. Predicted is the closed form of the counts, which the simulator knows without a "
        "clock; the timeline replays the same routing with the engine's schedule of prefetches; "
        "measured is the median. A step is predicted for the mean counts of the half of the steps "
        "nearest to the median.",
        table(("law", "median error", "worst error"), _law_cells(summary), "lrr"),
        f"{_counts(results, summary)} {_coverage(summary)}",
        "![What predicted steps and their parts are off by](figures/ladder.png)",
        "*Cases that the fit did not see; bars are 90 % intervals, which are to cross the line. "
        "([SVG](figures/ladder.svg))*",
        *_parts(summary, table),
        table(head, [_row_cells(row) for row in rows], "lrrlcrrrrrc"),
    ]


def _counts(results: Row, summary: Row) -> str:
    """What was compared on the spot, and what could be made again here."""
    checked = [row["simulator_counts_equal"] for row in results["engine"]]
    checked = [is_equal for is_equal in checked if is_equal is not None]
    words = (
        f"Where it was measured, {sum(checked)} of {len(checked)} cases counted event by event "
        "what the simulator counts on the routing they replayed. "
        f"{summary['num_counts_equal']} of {summary['num_counted']} do so on the routing as it is "
        "made again here for the timeline"
    )
    if summary["num_counts_equal"] == summary["num_counted"]:
        return f"{words}."
    return (
        f"{words}: a workload's routing that was drawn on a GPU is not, choice by choice, the one "
        "drawn on a CPU."
    )


def draw_ladder(rows: Sequence[Row]) -> Figure | None:
    """Errors of steps with their intervals, and errors of parts; None without cases to judge by."""
    rows = [row for row in rows if row["is_held_out"]]
    if not rows:
        return None
    names = [name for name in PARTS if any(_part_error(row, name) is not None for row in rows)]
    figure, grid = plt.subplots(
        1, 2 if names else 1, figsize=(9.6, 4.6), layout="constrained", squeeze=False
    )
    _draw_steps(grid[0, 0], rows)
    if names:
        _draw_parts(grid[0, 1], rows, names)
    for axes in grid[0]:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.axhline(0, color=INK, linewidth=0.8)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=6)
    return figure


def _draw_steps(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        x, measured_s = 1e3 * row["measured_s"], row["measured_s"]
        bounds_s = row["interval_s"] or (row["predicted_s"],) * 2
        low, high = (100 * (value / measured_s - 1) for value in bounds_s)
        colour = LOOKS[row["strategy"]].colour
        axes.vlines(x, low, high, color=colour, linewidth=0.8)
        marker = MARKERS.get(row["batch_size"], "o")
        axes.plot(x, 100 * row["error_ratio"], marker, color=colour, ms=4)
    for size in sorted({row["batch_size"] for row in rows}):
        axes.plot([], [], MARKERS.get(size, "o"), color=INK, ms=4, label=f"batch {size}")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        axes.plot([], [], color=LOOKS[name].colour, label=name)
    axes.set(xscale="log", xlabel="measured step, ms", ylabel="predicted less measured, %")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")


def _draw_parts(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        pairs = [(row, error) for row in rows if (error := _part_error(row, name)) is not None]
        # Side by side in the order of the table, so that points do not hide each other.
        x = place + np.linspace(-0.3, 0.3, len(pairs))
        for at, (row, error) in zip(x, pairs, strict=True):
            colour, marker = LOOKS[row["strategy"]].colour, MARKERS.get(row["batch_size"], "o")
            axes.plot(at, 100 * error, marker, color=colour, ms=3)
    axes.set(ylabel="part, predicted less measured, % of the step", xticks=range(len(names)))
    axes.set_xticklabels(names)


def _part_error(row: Row, name: str) -> float | None:
    part = row["parts"][name]
    if part["measured_s"] is None:
        return None
    return (part["predicted_s"] - part["measured_s"]) / row["measured_s"]


def _law_cells(summary: Row) -> list[tuple[str, str, str]]:
    return [
        (label, format_ratio(errors["median_ratio"]), format_ratio(errors["worst_ratio"]))
        for name, label in LAWS.items()
        if (errors := summary["errors"][name]) is not None
    ]


def _part_cells(summary: Row) -> list[tuple[str, str, str]]:
    return [
        (name, format_seconds(errors["median_s"]), format_ratio(errors["median_step_ratio"]))
        for name in PARTS
        if (errors := summary["parts"][name]) is not None
    ]


def _parts(summary: Row, table: Table) -> list[str]:
    cells = _part_cells(summary)
    if not cells:
        return ["The run does not hold the contrasts that tell parts apart."]
    return [
        "Parts are measured by differences: experts by cases that miss nothing and demand other "
        "numbers of experts, attention by contexts, fixed by what such cases take beside both, and "
        "copies by what is left. The first three come from cases that the fit saw.",
        table(("part", "median error", "of the step"), cells, "lrr"),
    ]


def _coverage(summary: Row) -> str:
    if summary["coverage_ratio"] is None:
        return "The profile does not say how sure it is, so there are no intervals."
    return f"The 90 % intervals hold {format_ratio(summary['coverage_ratio'])} of the measurements."


def _row_cells(row: Row) -> tuple[str, ...]:
    slots = f"{row['slots']}" if row["scope"] == "layer" else f"{row['slots']} (pool)"
    interval = row["interval_s"]
    return (
        f"`{row['strategy']}`",
        slots,
        f"{row['batch_size']}",
        row["routing"],
        "" if row["is_held_out"] else "fit",
        format_seconds(row["predicted_s"]),
        "" if interval is None else " to ".join(format_seconds(value) for value in interval),
        "" if row["simulated_s"] is None else format_seconds(row["simulated_s"]),
        format_seconds(row["measured_s"]),
        f"{100 * row['error_ratio']:+.1f} %",
        {True: "yes", False: "**no**", None: ""}[row["counts_equal"]],
    )
