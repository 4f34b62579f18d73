"""Two runs side by side: what they were made with, and every latency that both have."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.errors import UsageError

from ._run import BenchRun, Record
from ._summary import CellKey, Estimate, estimate, ratio_of_pairs, summarise
from .statistics import CONFIDENCE_RATIO, NUM_RESAMPLES

_SECTIONS = ("model", "hardware", "trace", "settings", "environment")
# Two runs always differ in these, and it says nothing.
_OWN = ("environment/date", "environment/argv")
# What the requests of a draw depend on; same here, same requests in the draw of the same number.
_DRAW_SETTINGS = ("seed", "num_steps", "num_warmup_steps", "context_tokens")

TIE, A_FASTER, B_FASTER, UNKNOWN = "tie", "A is faster", "B is faster", "one draw: unknown"


class Difference(NamedTuple):
    """A field that two runs do not agree on; None where one lacks it."""

    field: str
    a: Any
    b: Any


class Compared(NamedTuple):
    """One strategy at one batch size in both runs.

    Attributes:
      key: Strategy, batch size and dispatch.
      a: Mean step latency of the first run in seconds.
      b: The same of the second.
      b_over_a: Time of the second divided by that of the first.
      a_hit_ratio: Mean hit ratio of the first run.
      b_hit_ratio: The same of the second.
      verdict: A tie where the interval of the ratio contains 1.
    """

    key: CellKey
    a: Estimate
    b: Estimate
    b_over_a: Estimate
    a_hit_ratio: float
    b_hit_ratio: float
    verdict: str


class Comparison(NamedTuple):
    """Two runs of the same model.

    Attributes:
      is_paired: Both replayed the same requests, so that draws are compared one by one.
      differences: Settings, machine, routing and versions that differ.
      rows: What both have, in display order.
      num_only_a: Points that only the first run has.
      num_only_b: The same of the second.
    """

    is_paired: bool
    differences: tuple[Difference, ...]
    rows: tuple[Compared, ...]
    num_only_a: int
    num_only_b: int


def compare(a: BenchRun, b: BenchRun) -> Comparison:
    """Sets two runs side by side.

    Raises:
      UsageError: The models differ, or no strategy has the same batch size and dispatch in both.
    """
    if a.model["name"] != b.model["name"]:
        raise UsageError(
            f"the runs are of {a.model['name']} and {b.model['name']}: a step of one is other work "
            "than a step of the other",
            "Compare runs of one model: `moejax bench --model NAME` makes them.",
        )
    of_a, of_b = summarise(a).records, summarise(b).records
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise UsageError(
            f"the runs have nothing in common: one has {_points(of_a)}, the other {_points(of_b)}",
            "Run both with the same --strategies, --batch-sizes and --dispatch.",
        )
    is_paired = _draws(a) == _draws(b)
    order = {name: index for index, name in enumerate(a.strategies)}
    shared.sort(key=lambda key: (key.dispatch, key.batch_size, order[key.strategy]))
    return Comparison(
        is_paired=is_paired,
        differences=tuple(_differences(a, b)),
        rows=tuple(_compared(key, of_a[key], of_b[key], is_paired) for key in shared),
        num_only_a=len(of_a) - len(shared),
        num_only_b=len(of_b) - len(shared),
    )


def _draws(run: BenchRun) -> tuple[Any, ...]:
    trace = (run.trace.get("sha256"), run.trace["name"])
    return (*trace, *(run.settings.get(name) for name in _DRAW_SETTINGS))


def _compared(key: CellKey, a: Sequence[Record], b: Sequence[Record], is_paired: bool) -> Compared:
    times_a, times_b = ({row.run: row.latency_s.mean for row in rows} for rows in (a, b))
    both = sorted(times_a.keys() & times_b.keys())
    if is_paired and both:
        ratio = ratio_of_pairs([times_b[run] for run in both], [times_a[run] for run in both])
    else:
        ratio = _ratio_of_means(list(times_b.values()), list(times_a.values()))
    return Compared(
        key=key,
        a=estimate(list(times_a.values())),
        b=estimate(list(times_b.values())),
        b_over_a=ratio,
        a_hit_ratio=estimate([row.hit_ratio for row in a]).mean,
        b_hit_ratio=estimate([row.hit_ratio for row in b]).mean,
        verdict=_verdict(ratio),
    )


def _ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Mean of the first divided by that of the second, which are no pairs: each resampled alone."""
    mean = float(np.mean(above) / np.mean(below))
    if min(len(above), len(below)) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan)
    generator = np.random.default_rng(0)
    means = [
        generator.choice(values, size=(NUM_RESAMPLES, len(values))).mean(axis=1)
        for values in (above, below)
    ]
    tail = (1 - CONFIDENCE_RATIO) / 2
    low, high = np.quantile(means[0] / means[1], [tail, 1 - tail])
    return Estimate(mean, math.nan, float(low), float(high))


def _verdict(ratio: Estimate) -> str:
    if math.isnan(ratio.low):
        return UNKNOWN
    if ratio.low <= 1.0 <= ratio.high:
        return TIE
    return B_FASTER if ratio.high < 1.0 else A_FASTER


def _differences(a: BenchRun, b: BenchRun) -> Iterator[Difference]:
    fields_a, fields_b = (_flat({name: getattr(run, name) for name in _SECTIONS}) for run in (a, b))
    for name in dict.fromkeys([*fields_a, *fields_b]):
        one, other = fields_a.get(name), fields_b.get(name)
        if one != other and name not in _OWN:
            yield Difference(name, one, other)


def _flat(holder: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by the way to them; lists are leaves."""
    fields: dict[str, Any] = {}
    for name, value in holder.items():
        way = f"{prefix}{name}"
        fields |= _flat(value, f"{way}/") if isinstance(value, Mapping) else {way: value}
    return fields


def _points(records: Mapping[CellKey, Sequence[Record]]) -> str:
    strategies = ", ".join(dict.fromkeys(key.strategy for key in records))
    sizes = ", ".join(str(size) for size in sorted({key.batch_size for key in records}))
    ways = ", ".join(dict.fromkeys(key.dispatch for key in records))
    return f"{strategies} at batch {sizes} ({ways})"
