"""Many runs become one number with a spread: means, bootstrap intervals, ratios and fronts."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ._places import place
from ._run import BenchRun, Record
from .statistics import percentile_interval, resamples


class Estimate(NamedTuple):
    """A mean over runs; spread and interval are NaN when there is one run only."""

    mean: float
    std: float
    low: float
    high: float


class CellKey(NamedTuple):
    """What a cell of the grid has in common across its runs."""

    strategy: str
    batch_size: int
    dispatch: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """All runs of one strategy at one batch size and dispatch.

    Bytes and seconds are per decode step. Percentiles are over the steps of a run, averaged over
    runs; `step_cv_ratio` is likewise the standard deviation over steps divided by the mean.
    `place` is where its records stand in `results.json`.
    """

    key: CellKey
    place: str
    num_runs: int
    slots: float
    capacity_bytes: float
    latency_s: Estimate
    p50_s: Estimate
    p95_s: Estimate
    p99_s: Estimate
    step_cv_ratio: Estimate
    throughput_tokens_per_s: Estimate
    hit_ratio: Estimate
    late_ratio: Estimate
    fetched_bytes: Estimate
    wasted_bytes: Estimate
    stall_s: Estimate
    compute_s: Estimate
    transfer_s: Estimate
    memory_bytes: Estimate
    hit_ratio_per_gb: Estimate

    @property
    def hidden_transfer_s(self) -> float:
        """Time the link was busy while the step did not wait for it."""
        return min(max(self.transfer_s.mean - self.stall_s.mean, 0.0), self.compute_s.mean)

    @property
    def run_cv_ratio(self) -> float:
        """Standard deviation of the mean latency over runs, divided by its mean."""
        return self.latency_s.std / self.latency_s.mean


@dataclasses.dataclass(frozen=True)
class Summary:
    """The grid by cell, and the records behind it for ratios that pair runs."""

    cells: Mapping[CellKey, Cell]
    records: Mapping[CellKey, tuple[Record, ...]]

    def cell(self, strategy: str, batch_size: int, dispatch: str) -> Cell | None:
        """The cell of this key, None when the run did not cover it."""
        return self.cells.get(CellKey(strategy, batch_size, dispatch))


def summarise(run: BenchRun) -> Summary:
    """Groups the records of a run and estimates every quantity of every group."""
    groups: dict[CellKey, list[Record]] = {}
    for record in run.records:
        key = CellKey(record.strategy, record.batch_size, record.dispatch)
        groups.setdefault(key, []).append(record)
    records = {key: tuple(sorted(rows, key=lambda row: row.run)) for key, rows in groups.items()}
    cells = {key: _cell(key, rows) for key, rows in records.items()}
    return Summary(MappingProxyType(cells), MappingProxyType(records))


def estimate(samples: Sequence[float]) -> Estimate:
    """Mean, standard deviation and percentile-bootstrap interval of the mean.

    Reference:
      Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 2:
        return Estimate(float(values.mean()), math.nan, math.nan, math.nan)
    low, high = percentile_interval(values[resamples(len(values))].mean(axis=1))
    return Estimate(float(values.mean()), float(values.std(ddof=1)), low, high)


def speedup(
    summary: Summary, strategy: str, baseline: str, batch_size: int, dispatch: str
) -> Estimate | None:
    """Mean latency of `baseline` divided by that of `strategy`, over the runs both have.

    Runs are draws of requests, so the same run of both is one pair and pairs are resampled. The
    standard deviation is that of the per-run ratios.

    Returns:
      None when they share no run.
    """
    own = _latency_by_run(summary, strategy, batch_size, dispatch)
    base = _latency_by_run(summary, baseline, batch_size, dispatch)
    shared = sorted(own.keys() & base.keys())
    if not shared:
        return None
    return ratio_of_pairs([base[run] for run in shared], [own[run] for run in shared])


def scaling_factor(
    summary: Summary, run: BenchRun, strategy: str, dispatch: str
) -> Estimate | None:
    """Mean latency at the largest batch divided by that at the smallest.

    Returns:
      None when the run has one batch size only, or the strategy misses one of them.
    """
    smallest, largest = run.batch_sizes[0], run.batch_sizes[-1]
    low = _latency_by_run(summary, strategy, smallest, dispatch)
    high = _latency_by_run(summary, strategy, largest, dispatch)
    shared = sorted(low.keys() & high.keys())
    if smallest == largest or not shared:
        return None
    return ratio_of_pairs([high[index] for index in shared], [low[index] for index in shared])


def pareto_front(
    costs: Float[np.ndarray, " points"], gains: Float[np.ndarray, " points"]
) -> Bool[np.ndarray, " points"]:
    """Marks the points that no other point beats.

    A point is beaten by one that is no worse in both and better in one. Costs that read the same
    in three significant digits are the same cost: a few staging bytes make no trade-off.
    """
    costs = np.array([float(f"{cost:.3g}") for cost in costs])
    no_worse = (costs[None, :] <= costs[:, None]) & (gains[None, :] >= gains[:, None])
    better = (costs[None, :] < costs[:, None]) | (gains[None, :] > gains[:, None])
    return ~np.any(no_worse & better, axis=1)


def _cell(key: CellKey, rows: tuple[Record, ...]) -> Cell:
    def over_runs(value: Callable[[Record], float]) -> Estimate:
        return estimate([value(row) for row in rows])

    return Cell(
        key=key,
        place=place(row.pointer for row in rows),
        num_runs=len(rows),
        slots=max(row.slots for row in rows),
        capacity_bytes=max(row.capacity_bytes for row in rows),
        latency_s=over_runs(lambda row: row.latency_s.mean),
        p50_s=over_runs(lambda row: row.latency_s.p50),
        p95_s=over_runs(lambda row: row.latency_s.p95),
        p99_s=over_runs(lambda row: row.latency_s.p99),
        step_cv_ratio=over_runs(lambda row: row.latency_s.std / row.latency_s.mean),
        throughput_tokens_per_s=over_runs(lambda row: row.batch_size / row.latency_s.mean),
        hit_ratio=over_runs(lambda row: row.hit_ratio),
        late_ratio=over_runs(lambda row: row.late_ratio),
        fetched_bytes=over_runs(lambda row: row.fetched_bytes),
        wasted_bytes=over_runs(lambda row: row.wasted_bytes),
        stall_s=over_runs(lambda row: row.stall_s),
        compute_s=over_runs(lambda row: row.compute_s),
        transfer_s=over_runs(lambda row: row.transfer_s),
        memory_bytes=over_runs(lambda row: row.memory_bytes),
        hit_ratio_per_gb=over_runs(_hit_ratio_per_gb),
    )


def _hit_ratio_per_gb(row: Record) -> float:
    return row.hit_ratio / (row.memory_bytes / 1e9) if row.memory_bytes else 0.0


def _latency_by_run(
    summary: Summary, strategy: str, batch_size: int, dispatch: str
) -> dict[int, float]:
    rows = summary.records.get(CellKey(strategy, batch_size, dispatch), ())
    return {row.run: row.latency_s.mean for row in rows}


def ratio_of_pairs(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Mean of the first divided by that of the second; their items are pairs, resampled as such."""
    above_array, below_array = np.asarray(above), np.asarray(below)
    mean = float(above_array.mean() / below_array.mean())
    if len(above_array) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan)
    drawn = resamples(len(above_array))
    resampled = above_array[drawn].mean(axis=1) / below_array[drawn].mean(axis=1)
    low, high = percentile_interval(resampled)
    return Estimate(mean, float((above_array / below_array).std(ddof=1)), low, high)
