"""The study's experiment and the audited claims as read back from `results.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.claims import STRATEGIES_OF_STUDY

from ._check import Checker
from ._places import pointer

VERDICTS = (
    "contradicts itself",
    "depends on assumption",
    "not reproduced",
    "reproduced",
)
"""Most surprising first."""

CLAIMS_SHOWN = (
    "hit_rate_percent.intelligent.mean",
    "latency_ms.intelligent.speedup",
    "latency_ms.oracle.speedup",
    *(f"latency_ms.{name}.scaling_factor" for name in STRATEGIES_OF_STUDY),
)
"""Those of which the summary tells; the table has all."""

_FACTS_SHOWN = ("expert_bytes", "num_moe_layers", "num_experts", "available_gb.RTX 3090")
_CELL_FIELDS = ("latency_s", "compute_s", "stall_s", "hit_ratio", "memory_bytes", "capacity_bytes")
_READINGS = ("stated", "in_bytes", "in_tiers")


CellKey = tuple[str, int, str, int]


@dataclasses.dataclass(frozen=True)
class AuditedClaim:
    """One row of the audit; numbers are in `unit`, names and statements are text.

    Attributes:
      claim: Path of the claim in `claims.json`.
      claimed: What the study says.
      unit: Of every number of the row; empty where there is none.
      ours: In the study's geometry under its assumptions; None where nothing of ours bears on it.
      interval: Of ours, over runs; None for what is no mean over runs.
      ours_otherwise: The same with `assumption` lifted.
      ours_real: On the run's own model.
      verdict: One of `VERDICTS`.
      assumption: What the verdict may hang on.
      reason: Why, in one line.
      conflicts: Ids of the `known_conflicts` that concern the claim.
      sources: JSON pointers into `results.json` to what ours was made from.
      pointer: The same to this row.
    """

    claim: str
    claimed: float | str
    unit: str
    ours: float | str | None
    interval: tuple[float, float] | None
    ours_otherwise: float | str | None
    ours_real: float | str | None
    verdict: str
    assumption: str | None
    reason: str
    conflicts: tuple[str, ...]
    sources: tuple[str, ...]
    pointer: str


@dataclasses.dataclass(frozen=True)
class Study:
    """The study's experiment, done again.

    Attributes:
      settings: What it was run with.
      facts: What cards and profiles say, by name.
      slots: Slots of a layer by reading of the claims: `stated` (its K), `in_bytes` (what its
        memory holds) and `in_tiers` (its three tiers, shared by all layers).
      cells: Values of every run, by field, for each strategy, batch size, dispatch and slots.
      rows: The audited claims.
    """

    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    slots: Mapping[str, int]
    cells: Mapping[CellKey, Mapping[str, tuple[float, ...]]]
    rows: tuple[AuditedClaim, ...]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({key[1] for key in self.cells}))

    def mean(
        self,
        strategy: str,
        field: str,
        batch_size: int = 1,
        *,
        dispatch: str = "batched",
        slots: int | None = None,
    ) -> float:
        """Mean over runs; `slots` None is the stated K."""
        chosen = self.slots["stated"] if slots is None else slots
        return float(np.mean(self.cells[strategy, batch_size, dispatch, chosen][field]))

    def slot_choices(self) -> tuple[int, ...]:
        """Slots of a layer that were simulated at batch 1, ascending."""
        found = {key[3] for key in self.cells if key[1:3] == (1, "batched")}
        return tuple(sorted(found))

    def row(self, claim: str) -> AuditedClaim:
        """The row of a claim."""
        return next(row for row in self.rows if row.claim == claim)


def read_study(check: Checker, study: Any, audit: Any) -> Study | None:
    """Reads `study` and `audit`; None where the run has neither.

    Raises:
      BadFileError: A field is missing or wrong.
    """
    if study is None and audit is None:
        return None
    study = check.mapping(study, "study")
    settings = check.mapping(study.get("settings"), "study.settings")
    slots = check.mapping(settings.get("slots"), "study.settings.slots")
    check.number(settings, "tolerance_ratio", "study.settings")
    facts = check.mapping(study.get("facts"), "study.facts")
    for name in _FACTS_SHOWN:
        check.number(facts, name, "study.facts", is_positive=True)
    rows = check.sequence(audit, "audit")
    whole = Study(
        settings=settings,
        facts=facts,
        slots={name: check.count(slots, name, "study.settings.slots") for name in _READINGS},
        cells=dict(
            _cell(check, row, f"study.grid[{index}]")
            for index, row in enumerate(check.sequence(study.get("grid"), "study.grid"))
        ),
        rows=tuple(_row(check, row, index) for index, row in enumerate(rows)),
    )
    _check_whole(check, whole)
    return whole


def _check_whole(check: Checker, study: Study) -> None:
    """Refuses a study that lacks what its figures and its summary are made from."""
    ways = ("sequential", "batched")
    stated = study.slots["stated"]
    wanted = {(size, way, stated) for size in (1, *study.batch_sizes) for way in ways}
    wanted |= {(1, "batched", slots) for slots in (*study.slot_choices(), *study.slots.values())}
    for strategy in STRATEGIES_OF_STUDY:
        for point in sorted(wanted):
            if (strategy, *point) not in study.cells:
                raise check.fail(f"study.grid has no cell of {strategy} at {point}")
    lacking = set(CLAIMS_SHOWN) - {row.claim for row in study.rows}
    if lacking:
        raise check.fail(f"audit has no row of {min(lacking)}")


def _cell(check: Checker, row: Any, where: str) -> tuple[CellKey, Mapping[str, tuple[float, ...]]]:
    row = check.mapping(row, where)
    key = (
        check.text(row, "strategy", where),
        check.count(row, "batch_size", where),
        check.text(row, "dispatch", where),
        check.count(row, "slots", where),
    )
    values = {name: check.numbers(row, name, where) for name in _CELL_FIELDS}
    if not all(values.values()):
        raise check.fail(f"{where} has an empty list of runs")
    return key, values


def _row(check: Checker, row: Any, index: int) -> AuditedClaim:
    where = f"audit[{index}]"
    row = check.mapping(row, where)
    for name in ("claim", "verdict", "reason"):
        check.text(row, name, where)
    if row["verdict"] not in VERDICTS:
        raise check.fail(f"{where}.verdict is {row['verdict']!r}, not one of {VERDICTS}")
    if row.get("claimed") is None:
        raise check.fail(f"{where}.claimed is missing")
    for name in ("claimed", "ours", "ours_otherwise", "ours_real"):
        _check_value(check, row.get(name), f"{where}.{name}")
    interval = row.get("interval")
    if interval is not None:
        ends = check.sequence(interval, f"{where}.interval")
        if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
            raise check.fail(f"{where}.interval is not two numbers")
        interval = (float(ends[0]), float(ends[1]))
    unit, assumption = row.get("unit", ""), row.get("assumption")
    if not isinstance(unit, str) or not isinstance(assumption, str | None):
        raise check.fail(f"{where}.unit or {where}.assumption is not a text")
    return AuditedClaim(
        claim=row["claim"],
        claimed=row["claimed"],
        unit=unit,
        ours=row.get("ours"),
        interval=interval,
        ours_otherwise=row.get("ours_otherwise"),
        ours_real=row.get("ours_real"),
        verdict=row["verdict"],
        assumption=assumption,
        reason=row["reason"],
        conflicts=_texts(check, row, "conflicts", where),
        sources=_texts(check, row, "sources", where),
        pointer=pointer("audit", index),
    )


def _check_value(check: Checker, value: Any, where: str) -> None:
    if value is None or isinstance(value, str):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise check.fail(f"{where} is {value!r}, neither a number nor a name")


def _texts(check: Checker, row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = check.sequence(row.get(name), f"{where}.{name}")
    if not all(isinstance(value, str) for value in values):
        raise check.fail(f"{where}.{name} holds something that is not a name")
    return tuple(values)
