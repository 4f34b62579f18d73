"""The section on what speed is worth: efficiency scores, money, and the study's three fronts."""

from collections.abc import Mapping

import numpy as np

from moejax.claims import is_beaten, table
from moejax.units import format_ratio

from ._data import NotDrawnError, ReportData
from ._money import card_cost_table, memory_cost_table
from ._numbers import NOTHING, format_count, markdown_table
from ._places import link
from ._summary import pareto_front, speedup

_FUTURE = "oracle"


def worth_section(data: ReportData) -> list[str]:
    """Every table that the run has the data for; a price that is missing is asked for."""
    parts = ["## What it is worth"]
    for heading, make in (
        ("Efficiency scores", _scores),
        ("The study's three fronts", _fronts),
        ("Money", _money),
    ):
        try:
            parts.append(f"### {heading}\n\n{make(data)}")
        except NotDrawnError:
            continue
    return parts if len(parts) > 1 else []


def _scores(data: ReportData) -> str:
    size = data.run.batch_sizes[0]
    best = data.summary.cell(_FUTURE, size, data.dispatch)
    if best is None:
        raise NotDrawnError("scores are shares of the oracle's")
    claimed_hits = table(data.claims, "hit_rate_percent", "efficiency_score")
    claimed_memory = table(data.claims, "memory", "efficiency_score")
    rows = [
        (
            link(f"`{cell.key.strategy}`", best.place, cell.place),
            format_ratio(best.latency_s.mean / cell.latency_s.mean),
            _share(cell.hit_ratio.mean, best.hit_ratio.mean),
            _percent(claimed_hits.get(cell.key.strategy)),
            _share(best.memory_bytes.mean, cell.memory_bytes.mean)
            if cell.hit_ratio.mean
            else NOTHING,
            _percent(claimed_memory.get(cell.key.strategy)),
            format_count(cell.hit_ratio_per_gb.mean),
        )
        for cell in data.cells(size)
    ]
    header = (
        "strategy", "speed, of the oracle's", "hits, of the oracle's", "claimed",
        "the oracle's memory over its own", "claimed", "hit ratio per GB",
    )  # fmt: skip
    return (
        f"{markdown_table(header, rows)}\n\nBatch {size}. Scores are the study's: hits over the "
        "oracle's, and the oracle's memory over the strategy's. Here all have the same slots, so "
        "memory sets no two of those apart that keep anything; and hits are not speed: the first "
        "column is."
    )


def _money(data: ReportData) -> str:
    parts, missing = [], []
    for make in (memory_cost_table, card_cost_table):
        try:
            parts.append(make(data))
        except NotDrawnError as reason:
            missing.append(str(reason))
    if not parts:
        raise NotDrawnError("; ".join(missing))
    claimed = data.claims["roi"]
    said = (
        f"The study claims {claimed['oracle_memory_cost_usd']} USD of memory and a return of "
        f"{claimed['oracle_roi']} for `oracle`, for experts counted once instead of in every layer."
    )
    return "\n\n".join((*parts, *(f"Left out: {reason}." for reason in missing), said))


def _fronts(data: ReportData) -> str:
    size = data.run.batch_sizes[0]
    cells = data.cells(size)
    names = [cell.key.strategy for cell in cells]
    gains = {
        name: found.mean
        for name in names
        if (found := speedup(data.summary, name, data.baseline, size, data.dispatch)) is not None
    }
    memory = {cell.key.strategy: cell.memory_bytes.mean for cell in cells}
    hits = {cell.key.strategy: cell.hit_ratio.mean for cell in cells}
    scores = {entry["id"]: entry["complexity"] for entry in data.claims["strategies"].values()}
    claimed_gain = table(data.claims, "latency_ms", "speedup")
    claimed_memory = table(data.claims, "memory", "memory_mb")
    claimed_hits = table(data.claims, "hit_rate_percent", "mean")
    rows = []
    for front, title, own, claimed in (
        ("memory_vs_speedup", "speed, memory", (memory, gains), (claimed_memory, claimed_gain)),
        ("complexity_vs_speedup", "speed, complexity", (scores, gains), (scores, claimed_gain)),
        ("memory_vs_hit_rate", "hits, memory", (memory, hits), (claimed_memory, claimed_hits)),
    ):
        said = data.claims["pareto"][front]
        ours = _ours(*own, names)
        for name in names:
            is_scored = name in claimed[0] and name in claimed[1]
            rows.append(
                (
                    title,
                    f"`{name}`",
                    ("yes" if name in said else "no") if is_scored else NOTHING,
                    _beaten(is_beaten(name, *claimed)) if is_scored else NOTHING,
                    _front(ours, name),
                )
            )
    header = (
        "front", "strategy", "claimed to be on it", "by the study's own figures", "by ours",
    )  # fmt: skip
    return (
        f"{markdown_table(header, rows, words=header)}\n\nBatch {size}, speedup over "
        f"`{data.baseline}`. On a front is what no other is at least as good as in both and better "
        "in one; costs that agree in three digits are equal. The complexity is the study's score "
        "in both columns. A strategy that the study puts on a front though its own figures have a "
        "better one is the conflict `pareto_dominated`."
    )


def _ours(
    costs: Mapping[str, float], gains: Mapping[str, float], names: list[str]
) -> dict[str, bool]:
    known = [name for name in names if name in costs and name in gains]
    marks = pareto_front(
        np.array([costs[name] for name in known]), np.array([gains[name] for name in known])
    )
    return dict(zip(known, marks.tolist(), strict=True))


def _front(marks: Mapping[str, bool], name: str) -> str:
    if name not in marks:
        return f"{NOTHING} (no score)"
    return "on it" if marks[name] else "beaten"


def _beaten(other: str | None) -> str:
    return "on it" if other is None else f"beaten by `{other}`"


def _share(above: float, below: float) -> str:
    return format_ratio(above / below) if below else NOTHING


def _percent(value: float | None) -> str:
    return NOTHING if value is None else format_ratio(value / 100)
