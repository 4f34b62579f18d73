"""Which strategy and cache size to choose under a user's own constraints, from the data."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ._constraints import KINDS, Candidate, Constraint
from ._data import ReportData
from ._summary import CellKey
from .statistics import bootstrap_interval

KEEPS_NOTHING = "on_demand"
_KNOWS_THE_FUTURE = ("oracle",)


class Choice(NamedTuple):
    """The answer for one batch size.

    Attributes:
      best: Fastest of what meets all constraints, the smaller cache where two are alike; None
        where nothing does.
      ties: Others that meet them and whose interval over shared draws holds equal latency.
      num_left: How many candidates meet all.
      num_all: How many there are.
      excluded: By constraint, how many candidates it alone leaves out.
    """

    best: Candidate | None
    ties: tuple[Candidate, ...]
    num_left: int
    num_all: int
    excluded: Mapping[Constraint, int]


def candidates(data: ReportData, batch_size: int) -> tuple[Candidate, ...]:
    """Everything the run simulated at this batch size, the other cache sizes of `--full` too."""
    scores = {entry["id"]: entry["complexity"] for entry in data.claims["strategies"].values()}

    def candidate(name, slots, latency_s, p99_s, hit_ratio, memory_bytes) -> Candidate:
        return Candidate(
            name, batch_size, slots, latency_s, p99_s, hit_ratio, memory_bytes,
            scores.get(name), name in _KNOWS_THE_FUTURE,
        )  # fmt: skip

    found = []
    for name in data.run.strategies:
        rows = data.summary.records.get(CellKey(name, batch_size, data.dispatch), ())
        cell = data.summary.cell(name, batch_size, data.dispatch)
        if cell is None:
            continue
        latency_s = {row.run: row.latency_s.mean for row in rows}
        memory_bytes = max(row.memory_bytes for row in rows)
        slots = 0 if name == KEEPS_NOTHING else cell.slots
        found.append(
            candidate(name, slots, latency_s, cell.p99_s.mean, cell.hit_ratio.mean, memory_bytes)
        )
    sizes = data.run.further.get("capacities")
    # They were decoded in lockstep; a run one after another has nothing to stand beside them.
    if sizes is None or data.dispatch != "batched":
        return tuple(found)
    for cell in sizes.where(batch_size=batch_size):
        if cell.strategy != KEEPS_NOTHING:
            by_draw = dict(enumerate(cell.values["latency_s"].tolist()))
            found.append(
                candidate(
                    cell.strategy, cell.slots, by_draw, cell.mean("p99_s"),
                    cell.mean("hit_ratio"), float(cell.values["memory_bytes"].max()),
                )
            )  # fmt: skip
    return tuple(found)


def choose(
    among: Sequence[Candidate],
    constraints: Sequence[Constraint],
    cost: Callable[[Candidate], float] = lambda one: one.mean_s,
) -> Choice:
    """The cheapest candidate that meets all constraints; the future is ruled out unless allowed."""
    wanted = constraints
    if not any(one.name == "future" for one in constraints):
        wanted = (Constraint("future", 0.0), *constraints)
    left = [one for one in among if all(limit.is_met(one) for limit in wanted)]
    excluded = {limit: sum(not limit.is_met(one) for one in among) for limit in wanted}
    best = min(left, key=lambda one: (cost(one), one.memory_bytes), default=None)
    ties = ()
    if best is not None:
        ties = tuple(one for one in left if one is not best and _is_tie(one, best))
    return Choice(best, ties, len(left), len(among), excluded)


def nearest(among: Sequence[Candidate], constraint: Constraint) -> Candidate | None:
    """The candidate that comes closest to a constraint, None where none can be compared."""
    kind = KINDS[constraint.name]
    valued = [(kind.value(one), one) for one in among]
    known = [(value, one) for value, one in valued if value is not None]
    if not known:
        return None
    choose_end = max if kind.is_least else min
    return choose_end(known, key=lambda pair: pair[0])[1]


def _is_tie(one: Candidate, best: Candidate) -> bool:
    shared = sorted(one.latency_s.keys() & best.latency_s.keys())
    if len(shared) < 2:
        return False
    own, least = (np.array([c.latency_s[run] for run in shared]) for c in (one, best))
    low, _ = bootstrap_interval(lambda a, b: a.mean(-1) / b.mean(-1), own, least)
    return low <= 1.0
