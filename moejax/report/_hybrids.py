"""Hybrids against the best of their parts, on the same draws of requests."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ._data import ReportData
from ._further import Experiment, FurtherCell
from ._summary import CellKey
from .statistics import LEVEL_RATIO, Paired, bootstrap_interval, compare_paired, holm

HOSTS = ("stated", "cautious")
"""The run's own machine, and one as slow as its constants allow while the host computes."""

DISPATCH = "batched"
"""That of all experiments of `--full`."""

DEPENDS = "depends on the host"

_ON_HOST = "host_compute"


class Change(NamedTuple):
    """A hybrid's mean step over that of its best part, minus 1.

    Attributes:
      latency_s: The hybrid's mean step.
      ratio: The change.
      low: Lower end of its bootstrap interval; NaN with one draw.
      high: Upper end.
      verdict: `faster`, `slower` or `tie` by a paired t test, corrected over all hybrids; empty
        with one draw.
      place: Where the hybrid's records stand in `results.json`.
    """

    latency_s: float
    ratio: float
    low: float
    high: float
    verdict: str
    place: str


class Judged(NamedTuple):
    """A hybrid at one batch size.

    Attributes:
      cell: On the run's own machine.
      part: The fastest of its parts that the run has; None where it has none.
      part_s: Mean step of that part.
      changes: By host: both of `HOSTS` for what computes on it, `stated` for the others; none
        without a part.
    """

    cell: FurtherCell
    part: str | None
    part_s: float
    changes: dict[str, Change]

    @property
    def verdict(self) -> str:
        """What both hosts say, or that it depends on the host."""
        said = {change.verdict for change in self.changes.values()}
        return said.pop() if len(said) == 1 else DEPENDS if said else ""


def judge_hybrids(data: ReportData, hybrids: Experiment) -> list[Judged]:
    """Every hybrid at every batch size; their tests are one family for Holm's correction."""
    cells = {(cell.strategy, cell.batch_size, cell.head["host"]): cell for cell in hybrids.cells}
    points = dict.fromkeys((name, size) for name, size, _ in cells)
    compared = {}
    for name, size in points:
        part = _best_part(data, hybrids, name, size)
        for host in HOSTS if computes_on_host(name) else HOSTS[:1]:
            if part is not None and (name, size, host) in cells:
                compared[name, size, host] = _compare(data, cells[name, size, host], part)
    tested = {key: one.p_t for key, (one, _) in compared.items() if one is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    judged = []
    for name, size in points:
        part = _best_part(data, hybrids, name, size)
        part_s = np.nan if part is None else float(latencies_s(data, part, size).mean())
        changes = {
            host: change._replace(verdict=_verdict(change.ratio, corrected.get((name, size, host))))
            for host in HOSTS
            if (name, size, host) in compared
            for _, change in [compared[name, size, host]]
        }
        judged.append(Judged(cells[name, size, "stated"], part, part_s, changes))
    return judged


def computes_on_host(name: str) -> bool:
    """Whether a hybrid leaves some misses to the host."""
    return name.startswith(_ON_HOST)


def latencies_s(data: ReportData, strategy: str, batch_size: int) -> Float[np.ndarray, " draws"]:
    """Mean step latency of a strategy of the grid on every draw."""
    rows = data.summary.records[CellKey(strategy, batch_size, DISPATCH)]
    return np.array([row.latency_s.mean for row in rows])


def _best_part(data: ReportData, hybrids: Experiment, name: str, batch_size: int) -> str | None:
    found = {
        part: latencies_s(data, part, batch_size).mean()
        for part in hybrids.facts["parts"].get(name, ())
        if CellKey(part, batch_size, DISPATCH) in data.summary.records
    }
    return min(found, key=found.__getitem__, default=None)


def _compare(data: ReportData, cell: FurtherCell, part: str) -> tuple[Paired | None, Change]:
    mine, theirs = cell.values["latency_s"], latencies_s(data, part, cell.batch_size)
    shared = min(len(mine), len(theirs))
    mine, theirs = mine[:shared], theirs[:shared]
    low = high = np.nan
    if shared > 1:
        low, high = bootstrap_interval(lambda a, b: a.mean(-1) / b.mean(-1) - 1, mine, theirs)
    ratio = float(mine.mean() / theirs.mean()) - 1
    change = Change(cell.mean("latency_s"), ratio, low, high, "", cell.pointer)
    return compare_paired(mine, theirs), change


def _verdict(ratio: float, chance: float | None) -> str:
    if chance is None:
        return ""
    if chance >= LEVEL_RATIO:
        return "tie"
    return "faster" if ratio < 0 else "slower"
