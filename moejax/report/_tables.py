"""The tables behind the figures, written from the same cells."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from moejax.results import Measurement
from moejax.units import format_bytes, format_ratio, format_seconds

from ._data import NotDrawnError, ReportData
from ._numbers import (
    NOTHING,
    format_count,
    format_factor,
    format_interval,
    format_spread,
    format_with_interval,
    markdown_table,
)
from ._places import link, pointer
from ._published import PUBLISHED_ADDRESS, published_points
from ._summary import Cell, CellKey, pareto_front, scaling_factor, speedup

_ENDS = MappingProxyType({"h": "host", "d": "device"})


def latency_table(data: ReportData, dispatch: str) -> str:
    """Mean, spread, interval and percentiles of every cell."""
    header = (
        "strategy", "batch", "runs", "mean", "std over runs", "95 % interval of the mean",
        "p50", "p95", "p99", "std / mean over steps",
    )  # fmt: skip
    rows = [
        (
            link(f"`{cell.key.strategy}`", cell.place),
            str(cell.key.batch_size),
            str(cell.num_runs),
            format_seconds(cell.latency_s.mean),
            format_spread(cell.latency_s.std),
            format_interval(cell.latency_s, format_seconds),
            format_seconds(cell.p50_s.mean),
            format_seconds(cell.p95_s.mean),
            format_seconds(cell.p99_s.mean),
            format_ratio(cell.step_cv_ratio.mean),
        )
        for cell in _every_cell(data, dispatch)
    ]
    return markdown_table(header, rows)


def traffic_table(data: ReportData, dispatch: str) -> str:
    """Hits, bytes, time by cause and memory of every cell, means per decode step."""
    header = (
        "strategy", "batch", "hit ratio", "std over runs", "late", "fetched", "wasted",
        "compute", "transfer", "stall", "device memory",
    )  # fmt: skip
    rows = [
        (
            link(f"`{cell.key.strategy}`", cell.place),
            str(cell.key.batch_size),
            format_ratio(cell.hit_ratio.mean),
            format_ratio(cell.hit_ratio.std) if cell.num_runs > 1 else NOTHING,
            format_ratio(cell.late_ratio.mean),
            format_bytes(cell.fetched_bytes.mean),
            format_bytes(cell.wasted_bytes.mean),
            format_seconds(cell.compute_s.mean),
            format_seconds(cell.transfer_s.mean),
            format_seconds(cell.stall_s.mean),
            format_bytes(cell.memory_bytes.mean),
        )
        for cell in _every_cell(data, dispatch)
    ]
    return markdown_table(header, rows)


def speedup_table(data: ReportData, baseline: str, dispatch: str) -> str:
    """Speedup over a baseline with its interval, a column a batch size.

    Raises:
      NotDrawnError: The run does not have the baseline.
    """
    if baseline not in data.run.strategies:
        raise NotDrawnError(f"the run does not have {baseline}")
    sizes = data.run.batch_sizes
    rows = [
        (
            f"`{strategy}`",
            *(_speedup(data, CellKey(strategy, size, dispatch), baseline) for size in sizes),
        )
        for strategy in data.run.strategies
        if strategy != baseline
    ]
    if not rows:
        raise NotDrawnError(f"the run has nothing but {baseline}")
    return markdown_table(("strategy", *(f"batch {size}" for size in sizes)), rows)


def scaling_table(data: ReportData, dispatch: str) -> str:
    """How latency and throughput grow from the smallest to the largest batch.

    Raises:
      NotDrawnError: The run has one batch size.
    """
    smallest, largest = data.run.batch_sizes[0], data.run.batch_sizes[-1]
    if smallest == largest:
        raise NotDrawnError("the run has one batch size, so nothing scales")
    rows = []
    for strategy in data.run.strategies:
        factor = scaling_factor(data.summary, data.run, strategy, dispatch)
        ends = [data.summary.cell(strategy, size, dispatch) for size in (smallest, largest)]
        found = [end for end in ends if end is not None]
        grown = format_with_interval(factor, format_factor)
        rows.append(
            (
                f"`{strategy}`",
                link(grown, *(end.place for end in reversed(found))) if factor else NOTHING,
                *(NOTHING if end is None else _throughput(end) for end in ends),
            )
        )
    header = (
        "strategy",
        f"latency at batch {largest} / batch {smallest}",
        f"throughput, batch {smallest}",
        f"throughput, batch {largest}",
    )
    return markdown_table(header, rows)


def pareto_table(data: ReportData) -> str:
    """Costs and gains at the smallest batch, and which strategies nothing else beats."""
    cells = data.cells(data.run.batch_sizes[0])
    latency_s = np.array([cell.latency_s.mean for cell in cells])
    memory = np.array([cell.memory_bytes.mean for cell in cells])
    hits = np.array([cell.hit_ratio.mean for cell in cells])
    scores = {entry["id"]: entry["complexity"] for entry in data.claims["strategies"].values()}
    complexity = np.array([scores.get(cell.key.strategy, np.nan) for cell in cells])
    scored = np.isfinite(complexity)
    by_complexity = np.zeros(len(cells), bool)
    by_complexity[scored] = pareto_front(complexity[scored], -latency_s[scored])
    by_memory, by_hits = pareto_front(memory, -latency_s), pareto_front(memory, hits)
    rows = [
        (
            link(f"`{cell.key.strategy}`", cell.place),
            format_bytes(memory[index]),
            format_count(complexity[index]),
            format_seconds(latency_s[index]),
            format_ratio(hits[index]),
            "yes" if by_memory[index] else "no",
            "yes" if by_complexity[index] else "no" if scored[index] else NOTHING,
            "yes" if by_hits[index] else "no",
        )
        for index, cell in enumerate(cells)
    ]
    header = (
        "strategy", "device memory", "complexity (the study's score)", "mean step", "hit ratio",
        "front: speed, memory", "front: speed, complexity", "front: hits, memory",
    )  # fmt: skip
    return markdown_table(header, rows)


def hit_curve_table(data: ReportData) -> str:
    """Warm hit ratio by slots per layer, published points beside ours.

    Raises:
      NotDrawnError: The run has no hit curve.
    """
    curves = data.run.hit_curve
    if not curves:
        raise NotDrawnError("the run has no hit curve")
    published = published_points(data.run.model["name"])
    slots = sorted({slot for curve in curves.values() for slot in curve.slots})
    rows = []
    for name, curve in curves.items():
        ours = dict(zip(curve.slots, curve.hit_ratio_warm, strict=True))
        named = link(f"`{name}`", pointer("hit_curve", name))
        rows.append((named, *(_ratio(ours.get(slot)) for slot in slots)))
        if name in published:
            theirs = published[name]
            rows.append(
                (
                    f"`{name}`, [published]({PUBLISHED_ADDRESS})",
                    *(_ratio(theirs.get(int(slot))) for slot in slots),
                )
            )
    return markdown_table(("slots per layer", *(format(slot, "g") for slot in slots)), rows)


def tiers_table(data: ReportData) -> str:
    """Size of every tier and its spread over layers.

    Raises:
      NotDrawnError: There is no plan beside the run.
    """
    if not data.run.tiers:
        raise NotDrawnError("there is no plan")
    rows = [
        (
            link(tier.name, tier.pointer, file=tier.file),
            tier.memory,
            format_bytes(tier.capacity_bytes),
            str(sum(tier.experts_per_layer)),
            f"{min(tier.experts_per_layer, default=0)} to {max(tier.experts_per_layer, default=0)}",
        )
        for tier in data.run.tiers
    ]
    header = ("tier", "memory", "capacity", "experts", "experts a layer, fewest to most")
    return markdown_table(header, rows)


def transfer_table(data: ReportData) -> str:
    """Copies timed on the machine that ran the bench.

    Raises:
      NotDrawnError: Nothing was timed.
    """
    rows = []
    for index, row in enumerate(_timed(data, "transfer")):
        times = Measurement("copy", "s", tuple(row["samples_s"]))
        rate = row["num_bytes"] / times.median if times.median else float("nan")
        where = link(_way(row), pointer("measured", "transfer", index))
        rows.append((where, format_bytes(row["num_bytes"]), *_times(times), _rate(rate)))
    header = ("copy", "size", "samples", "median", "p05 to p95", "rate at the median")
    return markdown_table(header, rows)


def compute_table(data: ReportData) -> str:
    """Expert feed-forward passes timed on the machine that ran the bench.

    Raises:
      NotDrawnError: Nothing was timed.
    """
    rows = [
        (
            link(str(row.get("num_tokens", NOTHING)), pointer("measured", "compute", index)),
            format_bytes(row["num_bytes"]),
            *_times(Measurement("compute", "s", tuple(row["samples_s"]))),
        )
        for index, row in enumerate(_timed(data, "compute"))
    ]
    return markdown_table(("tokens", "weights", "samples", "median", "p05 to p95"), rows)


def _every_cell(data: ReportData, dispatch: str) -> Sequence[Cell]:
    cells = [cell for cell in data.summary.cells.values() if cell.key.dispatch == dispatch]
    order = {name: index for index, name in enumerate(data.run.strategies)}
    return sorted(cells, key=lambda cell: (cell.key.batch_size, order[cell.key.strategy]))


def _speedup(data: ReportData, key: CellKey, baseline: str) -> str:
    """A ratio of mean latencies, led to the records of both."""
    ratio = speedup(data.summary, key.strategy, baseline, *key[1:])
    cells = (data.summary.cell(name, *key[1:]) for name in (baseline, key.strategy))
    if ratio is None:
        return NOTHING
    written = format_with_interval(ratio, format_factor)
    return link(written, *(cell.place for cell in cells if cell is not None))


def _throughput(cell: Cell) -> str:
    return link(f"{format_count(cell.throughput_tokens_per_s.mean)} tokens/s", cell.place)


def _way(row: Mapping[str, Any]) -> str:
    """From where to where a copy went: `h2d` is from the host to the device."""
    ends = str(row.get("direction", "")).split("2")
    way = " to ".join(_ENDS.get(end, end) for end in ends)
    return f"{way} ({row['memory']})" if row.get("memory", "host") != "host" else way or "copy"


def _timed(data: ReportData, kind: str) -> Sequence:
    rows = data.run.measured.get(kind, ())
    if not rows:
        raise NotDrawnError("this run timed nothing on its machine")
    return rows


def _times(times: Measurement) -> tuple[str, str, str]:
    ends = f"{format_seconds(times.p05)} to {format_seconds(times.p95)}"
    return str(times.num_samples), format_seconds(times.median), ends


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s" if np.isfinite(bytes_per_s) else NOTHING


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else format_ratio(value)
