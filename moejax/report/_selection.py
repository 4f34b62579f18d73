"""Which strategy and cache size to choose under a user's own constraints, from the data."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ._constraints import FUTURE, KINDS, Candidate, Constraint
from ._data import ReportData
from ._further import FurtherCell
from ._places import place
from ._run import Record
from ._summary import CellKey
from .statistics import bootstrap_interval

KEEPS_NOTHING = "on_demand"
_KNOWS_THE_FUTURE = ("oracle",)
_ALL_DRAWS = 2**32


class Choice(NamedTuple):
    """The answer for one batch size.

    Attributes:
      best: Fastest of what meets all constraints, the smaller cache where two are alike; None
        where nothing does.
      ties: Others that meet them and whose interval over shared draws holds equal latency.
      num_left: How many candidates meet all.
      num_all: How many there are; what knows the future counts only where it is allowed.
      excluded: By constraint, how many candidates it alone leaves out.
      nearest: Where nothing meets all, by constraint what comes closest to it of that which meets
        all others; None where nothing does.
    """

    best: Candidate | None
    ties: tuple[Candidate, ...]
    num_left: int
    num_all: int
    excluded: Mapping[Constraint, int]
    nearest: Mapping[Constraint, Candidate | None]


def candidates(data: ReportData, batch_size: int) -> tuple[Candidate, ...]:
    """Everything the run simulated at this batch size, the other cache sizes of `--full` too.

    All are of the same draws of requests: with other cache sizes, of the few that those have.
    """
    others = _other_sizes(data, batch_size)
    draws = range(min((len(cell.values["latency_s"]) for cell in others), default=_ALL_DRAWS))
    scores = {entry["id"]: entry["complexity"] for entry in data.claims["strategies"].values()}
    found = []
    for name in data.run.strategies:
        records = data.summary.records.get(CellKey(name, batch_size, data.dispatch), ())
        rows = [row for row in records if row.run in draws]
        if rows:
            found.append(_of_grid(rows, scores.get(name)))
    return (*found, *(_of_other_size(cell, scores.get(cell.strategy)) for cell in others))


def choose(
    among: Sequence[Candidate],
    constraints: Sequence[Constraint],
    cost: Callable[[Candidate], float] = lambda one: one.mean_s,
) -> Choice:
    """The cheapest candidate that meets all constraints; the future is ruled out unless allowed."""
    may_know = any(one.name == FUTURE and one.limit for one in constraints)
    among = [one for one in among if may_know or not one.knows_future]
    limits = [one for one in constraints if one.name != FUTURE]
    left = _meeting(among, limits)
    best = min(left, key=lambda one: (cost(one), one.memory_bytes), default=None)
    nearest: dict[Constraint, Candidate | None] = {}
    if best is None:
        for limit in limits:
            others = [one for one in limits if one is not limit]
            nearest[limit] = _nearest(_meeting(among, others), limit)
    return Choice(
        best=best,
        ties=()
        if best is None
        else tuple(one for one in left if one is not best and _is_tie(one, best)),
        num_left=len(left),
        num_all=len(among),
        excluded={limit: len(among) - len(_meeting(among, [limit])) for limit in limits},
        nearest=nearest,
    )


def _meeting(among: Sequence[Candidate], limits: Sequence[Constraint]) -> list[Candidate]:
    return [one for one in among if all(limit.is_met(one) for limit in limits)]


def _nearest(among: Sequence[Candidate], limit: Constraint) -> Candidate | None:
    kind = KINDS[limit.name]
    sign = -1.0 if kind.is_least else 1.0
    known = [
        (sign * value, one.mean_s, one) for one in among if (value := kind.value(one)) is not None
    ]
    return min(known, key=lambda found: found[:2])[-1] if known else None


def _other_sizes(data: ReportData, batch_size: int) -> list[FurtherCell]:
    # They were decoded in lockstep; a run one after another has nothing to stand beside them.
    if "capacities" not in data.run.further or data.dispatch != "batched":
        return []
    cells = data.run.further["capacities"].where(batch_size=batch_size)
    return [cell for cell in cells if cell.strategy != KEEPS_NOTHING]


def _of_grid(rows: Sequence[Record], complexity: float | None) -> Candidate:
    return Candidate(
        strategy=rows[0].strategy,
        batch_size=rows[0].batch_size,
        slots=0 if rows[0].strategy == KEEPS_NOTHING else rows[0].slots,
        latency_s={row.run: row.latency_s.mean for row in rows},
        p99_s=float(np.mean([row.latency_s.p99 for row in rows])),
        hit_ratio=float(np.mean([row.hit_ratio for row in rows])),
        memory_bytes=max(row.memory_bytes for row in rows),
        complexity=complexity,
        knows_future=rows[0].strategy in _KNOWS_THE_FUTURE,
        place=place(row.pointer for row in rows),
    )


def _of_other_size(cell: FurtherCell, complexity: float | None) -> Candidate:
    return Candidate(
        strategy=cell.strategy,
        batch_size=cell.batch_size,
        slots=cell.slots,
        latency_s=dict(enumerate(cell.values["latency_s"].tolist())),
        p99_s=cell.mean("p99_s"),
        hit_ratio=cell.mean("hit_ratio"),
        memory_bytes=float(cell.values["memory_bytes"].max()),
        complexity=complexity,
        knows_future=cell.strategy in _KNOWS_THE_FUTURE,
        place=cell.pointer,
    )


def _is_tie(one: Candidate, best: Candidate) -> bool:
    shared = sorted(one.latency_s.keys() & best.latency_s.keys())
    if len(shared) < 2:
        return False
    own, least = (np.array([c.latency_s[run] for run in shared]) for c in (one, best))
    low, _ = bootstrap_interval(lambda a, b: a.mean(-1) / b.mean(-1), own, least)
    return low <= 1.0
