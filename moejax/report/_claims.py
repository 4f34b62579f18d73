"""The reference study's claims beside what this run gives, and why they differ."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moejax.units import format_bytes, format_ratio, format_seconds

from ._data import ReportData
from ._numbers import format_count, format_factor
from ._summary import Cell, Estimate, estimate, scaling_factor, speedup


class Ours(NamedTuple):
    """An estimate and the places in `results.json` that it was made from."""

    estimate: Estimate
    places: tuple[str, ...]


Writer = Callable[[float], str]
Finder = Callable[[ReportData, str, str], Ours | None]


class Quantity(NamedTuple):
    """One claimed column: where it stands, its unit, ours, and why the two differ.

    Attributes:
      title: What is compared.
      section: Table of `claims.json`.
      column: Column of that table; empty where the table has one number a strategy.
      scale: What one claimed unit is in ours.
      write: Writes a value in our unit.
      find: Ours for a strategy at a dispatch, None where the run lacks it.
      reason: Why the numbers differ, in one line.
      conflicts: Ids of `known_conflicts` that the reason rests on.
    """

    title: str
    section: str
    column: str
    scale: float
    write: Writer
    find: Finder
    reason: str
    conflicts: tuple[str, ...] = ()


class AuditRow(NamedTuple):
    """One claim about one strategy; `ours` is None where the run lacks what it needs."""

    quantity: Quantity
    strategy: str
    claimed: float
    ours: Ours | None


def audit_dispatch(data: ReportData) -> str:
    """Sequential where the run has it: that is what the study assumes."""
    return data.run.dispatches[-1]


def audit(data: ReportData) -> tuple[AuditRow, ...]:
    """Every claimed number that a bench run can speak about, beside ours."""
    dispatch = audit_dispatch(data)
    return tuple(
        AuditRow(
            quantity, strategy, claimed * quantity.scale, quantity.find(data, strategy, dispatch)
        )
        for quantity in QUANTITIES
        for strategy, claimed in _claimed(data.claims, quantity).items()
    )


def _claimed(claims: Mapping[str, Any], quantity: Quantity) -> dict[str, float]:
    table = claims[quantity.section]
    if not quantity.column:
        return dict(table)
    if "columns" not in table:
        return {name: entry[quantity.column] for name, entry in table.items()}
    index = table["columns"].index(quantity.column)
    return {name: row[index] for name, row in table.items() if name != "columns"}


def _at(batch_size: int, value: Callable[[Cell], Estimate]) -> Finder:
    def find(data: ReportData, strategy: str, dispatch: str) -> Ours | None:
        cell = data.summary.cell(strategy, batch_size, dispatch)
        return None if cell is None else Ours(value(cell), (cell.place,))

    return find


def _mean_speedup(data: ReportData, strategy: str, dispatch: str) -> Ours | None:
    found = {
        batch_size: speedup(data.summary, strategy, "on_demand", batch_size, dispatch)
        for batch_size in data.run.batch_sizes
    }
    means = [one.mean for one in found.values() if one is not None]
    if not means:
        return None
    read = [
        cell.place
        for name in ("on_demand", strategy)
        for cell in data.series(name, dispatch)
        if found[cell.key.batch_size] is not None
    ]
    return Ours(_without_interval(means), tuple(read))


def _mean_hit_ratio(data: ReportData, strategy: str, dispatch: str) -> Ours | None:
    cells = data.series(strategy, dispatch)
    if not cells:
        return None
    means = [cell.hit_ratio.mean for cell in cells]
    return Ours(_without_interval(means), tuple(cell.place for cell in cells))


def _scaling(data: ReportData, strategy: str, dispatch: str) -> Ours | None:
    # The claim is batch 16 over batch 1; another pair would be another quantity.
    sizes = data.run.batch_sizes
    factor = scaling_factor(data.summary, data.run, strategy, dispatch)
    if (sizes[0], sizes[-1]) != (1, 16) or factor is None:
        return None
    ends = [cell for cell in data.series(strategy, dispatch) if cell.key.batch_size in (1, 16)]
    return Ours(factor, tuple(cell.place for cell in reversed(ends)))


def _tail(cell: Cell) -> Estimate:
    return _without_interval([cell.p99_s.mean / cell.p50_s.mean])


def _run_cv(cell: Cell) -> Estimate:
    return _without_interval([cell.run_cv_ratio])


def _without_interval(values: list[float]) -> Estimate:
    """A mean over things that are no draws, so that no interval belongs to it."""
    nan = float("nan")
    return Estimate(estimate(values).mean, nan, nan, nan)


def _per_second(value: float) -> str:
    return f"{format_count(value)} /s"


QUANTITIES = (
    Quantity(
        "latency, batch 1", "latency_ms", "batch1_mean", 1e-3, format_seconds,
        _at(1, lambda cell: cell.latency_s),
        "the claim names no unit of work; ours is one decode step", ("no_unit_of_work",),
    ),
    Quantity(
        "latency, batch 16", "latency_ms", "batch16_mean", 1e-3, format_seconds,
        _at(16, lambda cell: cell.latency_s),
        "the claim is 16.00 times batch 1; requests of a batch share experts",
        ("exactly_linear_batch", "no_unit_of_work"),
    ),
    Quantity(
        "scaling factor, batch 16 / batch 1", "latency_ms", "scaling_factor", 1.0, format_factor,
        _scaling,
        "exactly linear only if no two requests ever share an expert", ("exactly_linear_batch",),
    ),
    Quantity(
        "speedup over on_demand, mean over batches", "speedup", "avg", 1.0, format_factor,
        _mean_speedup,
        "ours gives every strategy the same slots; the claimed caches differ in size",
        ("slots_vs_memory", "top_k_32_or_64"),
    ),
    Quantity(
        "hit ratio, mean over batches", "hit_rate_percent", "mean", 1e-2, format_ratio,
        _mean_hit_ratio,
        "the claims fit no single capacity, and the abstract claims another number",
        ("one_pool_for_all_layers", "slots_vs_memory", "abstract_hit_rate"),
    ),
    Quantity(
        "device memory for experts", "memory", "memory_mb", 1e6, format_bytes,
        _at(1, lambda cell: cell.memory_bytes),
        "the claim counts experts once, ours in every layer",
        ("one_pool_for_all_layers", "slots_vs_memory", "top_k_32_or_64"),
    ),
    Quantity(
        "p99 / p50, batch 1", "tail_latency_ms_batch1", "p99_over_p50", 1.0, format_factor,
        _at(1, _tail),
        "ours is over decode steps of one clock; the origin of the claimed spread is not given",
        ("p99_below_1000ms",),
    ),
    Quantity(
        "coefficient of variation over runs, batch 1", "coefficient_of_variation_percent", "",
        1e-2, format_ratio, _at(1, _run_cv),
        "our runs are other draws of requests, with no noise added",
    ),
    Quantity(
        "throughput, batch 1", "throughput_requests_per_s", "batch1", 1.0,
        _per_second, _at(1, lambda cell: cell.throughput_tokens_per_s),
        "claimed in requests, ours in tokens: one step gives one token a request",
        ("no_unit_of_work",),
    ),
    Quantity(
        "throughput, batch 16", "throughput_requests_per_s", "batch16", 1.0,
        _per_second, _at(16, lambda cell: cell.throughput_tokens_per_s),
        "contradicts the claimed latency at batch 16, which gives a tenth of it",
        ("throughput_vs_latency",),
    ),
)  # fmt: skip
