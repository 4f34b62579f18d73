"""The section on statistics: effects, tests, spread, tails, throughput, interaction."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moejax.units import format_change, format_ratio, format_seconds

from ._data import NotDrawnError, ReportData
from ._numbers import (
    NOTHING,
    format_count,
    format_factor,
    format_with_interval,
    markdown_table,
)
from ._places import link
from ._summary import Cell, CellKey, Estimate
from .statistics import (
    LEVEL_RATIO,
    NUM_RESAMPLES,
    Interaction,
    Paired,
    bootstrap_interval,
    compare_paired,
    holm,
    interaction,
)

_PLAIN = "lru"


class Comparison(NamedTuple):
    """Two strategies at one batch size, with p-values corrected for their table."""

    strategy: str
    other: str
    batch_size: int
    paired: Paired
    p_t: float
    p_signed_rank: float

    @property
    def verdict(self) -> str:
        """By the corrected t test."""
        if self.p_t >= LEVEL_RATIO:
            return "tie"
        return "faster" if self.paired.mean < 0 else "slower"


def statistics_section(data: ReportData) -> list[str]:
    """Every table of the section; those that the run has too few draws for are left out."""
    tables: Sequence[tuple[str, Callable[[ReportData], str]]] = (
        ("Paired differences", _differences),
        ("Ranking with ties", _ranking),
        ("Variation and tails", _spread),
        ("Throughput", _throughput),
        ("Strategy and batch size together", _interaction),
    )
    parts = []
    for heading, make in tables:
        try:
            parts.append(f"### {heading}\n\n{make(data)}")
        except NotDrawnError:
            continue
    if not parts:
        return []
    return ["## Statistics", _introduction(data), *parts]


def compare(
    data: ReportData, pairs: Sequence[tuple[str, str]], batch_sizes: Sequence[int]
) -> list[Comparison]:
    """Compares mean step latencies draw by draw; all comparisons are one family for Holm."""
    found = [
        (own, other, size, paired)
        for size in batch_sizes
        for own, other in pairs
        if (paired := _paired(data, own, other, size)) is not None
    ]
    by_t = holm([paired.p_t for *_, paired in found])
    by_rank = holm([paired.p_signed_rank for *_, paired in found])
    return [
        Comparison(*one, p_t, p_rank) for one, p_t, p_rank in zip(found, by_t, by_rank, strict=True)
    ]


def analyse(data: ReportData) -> tuple[Interaction, tuple[str, ...], tuple[int, ...]]:
    """The interaction of the strategies and batch sizes that the run has all draws of.

    Raises:
      NotDrawnError: There are too few.
    """
    sizes = data.run.batch_sizes
    by_cell = {
        (name, size): _by_draw(data, name, size) for name in data.run.strategies for size in sizes
    }
    draws = set.intersection(*(set(one) for one in by_cell.values()))
    found = None
    if draws:
        latency_s = np.array(
            [
                [[by_cell[name, size][draw] for size in sizes] for name in data.run.strategies]
                for draw in sorted(draws)
            ]
        )
        found = interaction(latency_s)
    if found is None:
        raise NotDrawnError("too few draws, strategies or batch sizes")
    return found, data.run.strategies, sizes


def _introduction(data: ReportData) -> str:
    return (
        "Replicates are draws of requests: the simulator is deterministic, no noise is added, and "
        "all strategies meet the same draws, so every comparison pairs them. What is tested is "
        "whether another draw of requests could turn a difference round; the error of the cost "
        "model is not in it. Times are mean step latencies"
        + (f", {data.dispatch} dispatch." if len(data.run.dispatches) > 1 else ".")
    )


def _differences(data: ReportData) -> str:
    names = data.run.strategies
    base = _PLAIN if _PLAIN in names else data.baseline
    pairs = [(name, base) for name in names if name != base]
    found = compare(data, pairs, data.run.batch_sizes)
    if not found:
        raise NotDrawnError("one draw has nothing to be paired with")
    header = (
        "strategy", "batch", f"difference from `{base}`", "95 % interval", "effect g_z",
        "95 % interval of g_z", "p, paired t", "p, signed rank", "verdict",
    )  # fmt: skip
    rows = [
        (
            link(f"`{one.strategy}`", *_places(data, one.batch_size, one.other, one.strategy)),
            str(one.batch_size),
            _signed(one.paired.mean),
            f"{_signed(one.paired.low)} to {_signed(one.paired.high)}",
            _effect(one.paired.effect),
            f"{_effect(one.paired.effect_low)} to {_effect(one.paired.effect_high)}"
            if math.isfinite(one.paired.effect)
            else NOTHING,
            _chance(one.p_t),
            _chance(one.p_signed_rank),
            one.verdict,
        )
        for one in found
    ]
    num_pairs = min(one.paired.num_pairs for one in found)
    least = min(1.0, len(found) * 2.0 ** (1 - num_pairs))
    return (
        f"{markdown_table(header, rows, words=('verdict',))}\n\n"
        f"Both tests are two-sided and corrected by Holm's method over the {len(found)} "
        f"comparisons of this table; the verdict is the t test's at {format_ratio(LEVEL_RATIO)}. "
        f"The signed-rank test assumes no shape of the differences, but with {num_pairs} draws it "
        f"cannot get below {_chance(least)} here. g_z is the mean difference over the standard "
        "deviation of the differences, corrected for few draws; without noise it is large wherever "
        "one strategy wins on every draw, and says how sure, not how much."
    )


def _ranking(data: ReportData) -> str:
    sizes = data.run.batch_sizes
    pairs = list(itertools.combinations(data.run.strategies, 2))
    found = compare(data, pairs, sizes)
    if not found:
        raise NotDrawnError("one draw has nothing to be paired with")
    tied = {
        (frozenset((one.strategy, one.other)), one.batch_size)
        for one in found
        if one.verdict == "tie"
    }
    rows = []
    for size in sizes:
        cells = sorted(data.cells(size), key=lambda cell: cell.latency_s.mean)
        names = [cell.key.strategy for cell in cells]
        line = f"`{names[0]}`"
        for before, after in itertools.pairwise(names):
            is_tied = (frozenset((before, after)), size) in tied
            line += f" {'≈' if is_tied else '<'} `{after}`"
        rows.append((link(str(size), *_places(data, size, *names)), line))
    table = markdown_table(("batch", "fastest first"), rows, words=("fastest first",))
    return (
        f"{table}\n\n`<`: faster by a paired t test, corrected by Holm's method over all "
        f"{len(found)} pairs and batch sizes at {format_ratio(LEVEL_RATIO)}; `≈`: not told apart."
    )


def _spread(data: ReportData) -> str:
    cells = [cell for size in data.run.batch_sizes for cell in data.cells(size)]
    if max(cell.num_runs for cell in cells) < 2:
        raise NotDrawnError("one draw has no spread")
    header = (
        "strategy", "batch", "variation over draws", "p50", "p95", "p99", "p99 / p50",
    )  # fmt: skip
    rows = [
        (
            link(f"`{cell.key.strategy}`", cell.place),
            str(cell.key.batch_size),
            format_with_interval(_variation(data, cell.key), format_ratio),
            format_with_interval(cell.p50_s, format_seconds),
            format_with_interval(cell.p95_s, format_seconds),
            format_with_interval(cell.p99_s, format_seconds),
            format_with_interval(_tail(data, cell.key), format_factor),
        )
        for cell in cells
    ]
    return (
        f"{markdown_table(header, rows)}\n\nVariation is the coefficient of variation: the "
        "standard deviation over draws of the mean step over its mean. Percentiles are over the "
        f"steps of a draw. Intervals in parentheses: 95 % bootstrap over draws, "
        f"{NUM_RESAMPLES:,} resamples."
    )


def _throughput(data: ReportData) -> str:
    sizes = data.run.batch_sizes

    def shown(cell: Cell | None) -> str:
        if cell is None:
            return NOTHING
        return format_with_interval(cell.throughput_tokens_per_s, format_count)

    rows = [
        (
            link(f"`{name}`", *(cell.place for cell in data.series(name))),
            *(shown(data.summary.cell(name, size, data.dispatch)) for size in sizes),
            _growth(data, name),
        )
        for name in data.run.strategies
    ]
    header = ("strategy", *(f"tokens/s, batch {size}" for size in sizes), "last over first")
    return (
        f"{markdown_table(header, rows)}\n\nTokens of all requests of the batch together. "
        f"Throughput that grew with the batch would be {format_factor(sizes[-1] / sizes[0])} in "
        "the last column."
    )


def _growth(data: ReportData, name: str) -> str:
    cells = data.series(name)
    if len(cells) < 2:
        return NOTHING
    first, last = (cell.throughput_tokens_per_s.mean for cell in (cells[0], cells[-1]))
    return format_factor(last / first)


def _interaction(data: ReportData) -> str:
    found, names, sizes = analyse(data)
    every = [place for size in sizes for place in _places(data, size, *names)]
    rows = [
        (
            link(one.name, *every),
            f"{one.num_degrees}, {one.num_error_degrees}",
            format_count(one.f),
            _chance(one.p),
            format_ratio(one.share_ratio),
        )
        for one in found.sources
    ]
    header = ("source", "degrees of freedom", "F", "p", "partial eta squared")
    far = np.unravel_index(np.abs(found.departure_ratio).argmax(), found.departure_ratio.shape)
    return (
        f"{markdown_table(header, rows)}\n\nTwo-way analysis of variance with repeated measures on "
        "the logarithm of the mean step, in which a constant factor between strategies is no "
        "interaction; p by the lower bound of Geisser and Greenhouse, which assumes nothing of "
        "how draws go together. The interaction is largest for "
        f"`{names[far[0]]}` at batch {sizes[far[1]]}: its step takes "
        f"{format_change(found.departure_ratio[far])} beside what strategy and batch size give "
        "separately."
    )


def _places(data: ReportData, batch_size: int, *names: str) -> list[str]:
    cells = (data.summary.cell(name, batch_size, data.dispatch) for name in names)
    return [cell.place for cell in cells if cell is not None]


def _variation(data: ReportData, key: CellKey) -> Estimate | None:
    values = np.array([row.latency_s.mean for row in data.summary.records[key]])
    return _estimated(lambda column: column.std(-1, ddof=1) / column.mean(-1), values)


def _tail(data: ReportData, key: CellKey) -> Estimate | None:
    rows = data.summary.records[key]
    return _estimated(
        lambda above, below: above.mean(-1) / below.mean(-1),
        np.array([row.latency_s.p99 for row in rows]),
        np.array([row.latency_s.p50 for row in rows]),
    )


def _estimated(statistic: Callable, *columns: np.ndarray) -> Estimate | None:
    if len(columns[0]) < 2:
        return None
    low, high = bootstrap_interval(statistic, *columns)
    return Estimate(float(statistic(*columns)), math.nan, low, high)


def _paired(data: ReportData, own: str, other: str, batch_size: int) -> Paired | None:
    mine, theirs = (_by_draw(data, name, batch_size) for name in (own, other))
    shared = sorted(mine.keys() & theirs.keys())
    return compare_paired(
        np.array([mine[draw] for draw in shared]), np.array([theirs[draw] for draw in shared])
    )


def _by_draw(data: ReportData, strategy: str, batch_size: int) -> Mapping[int, float]:
    rows = data.summary.records.get(CellKey(strategy, batch_size, data.dispatch), ())
    return {row.run: row.latency_s.mean for row in rows}


def _signed(value_s: float) -> str:
    return f"{'+' if value_s > 0 else ''}{format_seconds(value_s)}"


def _effect(value: float) -> str:
    return f"{'+' if value > 0 else ''}{format_count(value)}" if math.isfinite(value) else NOTHING


def _chance(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else format_count(p)
