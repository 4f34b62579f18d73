"""A bench run as read back from `results.json`: checked once, then plain frozen records."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.errors import BadFileError
from moejax.results import read_json

from ._check import Checker
from ._further import Further, read_further
from ._palette import STRATEGY_ORDER
from ._places import PLAN_FILE, RESULTS_FILE, pointer
from ._study import Study, read_study

SCHEMA = "moejax.bench/1"

_LATENCY_FIELDS = ("mean", "std", "p50", "p95", "p99")
_COUNT_FIELDS = ("batch_size", "run", "num_late", "num_demands", "num_hits", "num_steps")
_RATIO_FIELDS = ("hit_ratio", "late_ratio")
_AMOUNT_FIELDS = (
    "slots",
    "capacity_bytes",
    "fetched_bytes",
    "wasted_bytes",
    "stall_s",
    "compute_s",
    "transfer_s",
    "memory_bytes",
)
_DISPATCHES = ("batched", "sequential")
_HIGHEST = 1 + 1e-9


@dataclasses.dataclass(frozen=True)
class StepLatency:
    """Latency of one decode step over the steps of one run, in seconds."""

    mean: float
    std: float
    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True)
class Record:
    """One point of the grid: one strategy at one batch size on one draw of requests.

    Bytes and seconds are means per decode step; counts are totals over the run. `pointer` is
    where the record stands in `results.json`.
    """

    strategy: str
    batch_size: int
    run: int
    dispatch: str
    slots: float
    capacity_bytes: float
    num_late: int
    num_demands: int
    num_hits: int
    num_steps: int
    latency_s: StepLatency
    hit_ratio: float
    late_ratio: float
    fetched_bytes: float
    wasted_bytes: float
    stall_s: float
    compute_s: float
    transfer_s: float
    memory_bytes: float
    pointer: str


@dataclasses.dataclass(frozen=True)
class HitCurve:
    """Hit ratio against slots per layer, by the two conventions of `moejax simulate`."""

    slots: tuple[float, ...]
    hit_ratio: tuple[float, ...]
    hit_ratio_warm: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Tier:
    """One memory tier of a plan of `moejax tune-cache`, experts counted per layer.

    `file` and `pointer` say where it stands.
    """

    name: str
    memory: str
    capacity_bytes: float
    experts_per_layer: tuple[int, ...]
    file: str
    pointer: str


@dataclasses.dataclass(frozen=True)
class BenchRun:
    """Everything that the report may say: nothing else is looked up.

    Args:
      environment: Device, versions, commit, command, seed and date of the run.
      model: Fields of the model's card.
      hardware: Name and title of the profile that gave the clock, and a note on it.
      constants: The profile's constants by name, each with value, unit, kind and source.
      trace: Name, workload (None for recorded routing) and provenance of the routing.
      settings: Options of the run.
      records: The grid, in the order of the file.
      hit_curve: By strategy; empty when the run has none.
      measured: Timings of the machine that ran the bench: `transfer` and `compute` lists.
      tiers: Fastest first; empty when there is no plan.
      study: The reference study's experiment and its audited claims; None without `--audit`.
      further: The experiments of `--full` by key; empty without it.
    """

    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    hardware: Mapping[str, Any]
    constants: Mapping[str, Mapping[str, Any]]
    trace: Mapping[str, Any]
    settings: Mapping[str, Any]
    records: tuple[Record, ...]
    hit_curve: Mapping[str, HitCurve]
    measured: Mapping[str, Sequence[Mapping[str, Any]]]
    tiers: tuple[Tier, ...]
    study: Study | None = None
    further: Further = dataclasses.field(default_factory=dict)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Strategies of the grid in display order, unknown ones last by name."""
        return display_order({record.strategy for record in self.records})

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes of the grid's first dispatch, ascending."""
        first = self.dispatches[0]
        return tuple(sorted({row.batch_size for row in self.records if row.dispatch == first}))

    @property
    def dispatches(self) -> tuple[str, ...]:
        """Dispatches of the grid; the first one is drawn where only one can be."""
        found = {record.dispatch for record in self.records}
        return tuple(dispatch for dispatch in _DISPATCHES if dispatch in found)


def display_order(strategies: set[str]) -> tuple[str, ...]:
    """Sorts strategies as every table and figure lists them."""
    known = [name for name in STRATEGY_ORDER if name in strategies]
    return (*known, *sorted(strategies.difference(known)))


def read_run(folder: Path) -> BenchRun:
    """Reads and checks `folder/results.json`, and `folder/plan.json` where there is one.

    Args:
      folder: What `moejax bench --out` wrote.

    Raises:
      BadFileError: A file is missing, damaged, of another schema, or inconsistent.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise BadFileError(
            f"{folder} has no results.json",
            "Name the folder that `moejax bench --out FOLDER` wrote.",
        )
    check = Checker(path, "Run `moejax bench` again to make a new one.")
    content = check.mapping(read_json(path), "the file")
    if content.get("schema") != SCHEMA:
        is_older = str(content.get("schema")).startswith(f"{SCHEMA.partition('/')[0]}/")
        raise BadFileError(
            f"{path} has schema {content.get('schema')!r}, not {SCHEMA!r}",
            "Run this version's `moejax bench` again; older results need the version that "
            "wrote them."
            if is_older
            else "Name a run of `moejax bench` (without --engine), which this report is about.",
        )
    sections = {name: check.mapping(content.get(name), name) for name in _SECTIONS}
    check.number(sections["model"], "expert_bytes", "model", is_positive=True)
    for section in ("model", "hardware", "trace"):
        check.text(sections[section], "name", section)
    return BenchRun(
        environment=sections["environment"],
        model=sections["model"],
        hardware=sections["hardware"],
        constants=_constants(check, sections["hardware"].get("constants") or {}),
        trace=sections["trace"],
        settings=check.mapping(content.get("settings", {}), "settings"),
        records=_records(check, content.get("grid"), content.get("baseline") or []),
        hit_curve=_hit_curves(check, content.get("hit_curve") or {}),
        measured=_measured(check, content.get("measured") or {}),
        tiers=_tiers(folder, content.get("tune")),
        study=read_study(check, content.get("study"), content.get("audit")),
        further=read_further(check, content),
    )


_SECTIONS = ("environment", "model", "hardware", "trace")


def _records(check: Checker, grid: Any, baseline: Any) -> tuple[Record, ...]:
    """The experiment's points and those of the baseline that every run carries beside them."""
    rows = check.sequence(grid, "grid")
    if not rows:
        raise check.fail("grid is empty, so there is nothing to report")
    others = check.sequence(baseline, "baseline")
    records = tuple(
        _record(check, row, name, index)
        for name, section in (("grid", rows), ("baseline", others))
        for index, row in enumerate(section)
    )
    seen: set[tuple[str, int, int, str]] = set()
    for record in records:
        key = (record.strategy, record.batch_size, record.run, record.dispatch)
        if key in seen:
            raise check.fail(
                f"grid has two records of {record.strategy}, batch {record.batch_size}, "
                f"run {record.run}, {record.dispatch}"
            )
        seen.add(key)
    return records


def _record(check: Checker, row: Any, section: str, index: int) -> Record:
    where = f"{section}[{index}]"
    row = check.mapping(row, where)
    latency = check.mapping(row.get("latency_s"), f"{where}.latency_s")
    fields: dict[str, Any] = {
        "pointer": pointer(section, index),
        "strategy": check.text(row, "strategy", where),
        "dispatch": check.text(row, "dispatch", where),
        "latency_s": StepLatency(
            **{name: check.number(latency, name, f"{where}.latency_s") for name in _LATENCY_FIELDS}
        ),
    }
    fields |= {name: check.count(row, name, where) for name in _COUNT_FIELDS}
    fields |= {name: check.number(row, name, where, highest=_HIGHEST) for name in _RATIO_FIELDS}
    fields |= {name: check.number(row, name, where) for name in _AMOUNT_FIELDS}
    record = Record(**fields)
    if record.dispatch not in _DISPATCHES:
        raise check.fail(f"{where}.dispatch is {record.dispatch!r}, not one of {_DISPATCHES}")
    if record.batch_size < 1 or record.latency_s.mean <= 0:
        raise check.fail(f"{where} has a batch size or a mean latency of 0")
    if not record.latency_s.p50 <= record.latency_s.p95 <= record.latency_s.p99:
        raise check.fail(f"{where}.latency_s has percentiles out of order")
    if record.num_hits + record.num_late > record.num_demands:
        raise check.fail(f"{where} has more hits and late arrivals than demands")
    return record


def _constants(check: Checker, content: Any) -> dict[str, Mapping[str, Any]]:
    content = check.mapping(content, "hardware.constants")
    for name, constant in content.items():
        where = f"hardware.constants.{name}"
        constant = check.mapping(constant, where)
        check.number(constant, "value", where)
        check.text(constant, "unit", where)
        check.text(constant, "kind", where)
    return dict(content)


def _hit_curves(check: Checker, content: Any) -> dict[str, HitCurve]:
    content = check.mapping(content, "hit_curve")
    curves = {}
    for name in display_order(set(content)):
        where = f"hit_curve.{name}"
        holder = check.mapping(content[name], where)
        curve = HitCurve(
            *(check.numbers(holder, field.name, where) for field in dataclasses.fields(HitCurve))
        )
        if len({len(curve.slots), len(curve.hit_ratio), len(curve.hit_ratio_warm)}) != 1:
            raise check.fail(f"{where} has lists of different lengths")
        curves[name] = curve
    return curves


def _measured(check: Checker, content: Any) -> dict[str, Sequence[Mapping[str, Any]]]:
    content = check.mapping(content, "measured")
    measured = {}
    for kind in ("transfer", "compute"):
        rows = check.sequence(content.get(kind) or [], f"measured.{kind}")
        for index, row in enumerate(rows):
            where = f"measured.{kind}[{index}]"
            row = check.mapping(row, where)
            check.count(row, "num_bytes", where)
            if not check.numbers(row, "samples_s", where):
                raise check.fail(f"{where}.samples_s is empty")
        measured[kind] = rows
    return measured


def _tiers(folder: Path, tune: Any) -> tuple[Tier, ...]:
    path = folder / PLAN_FILE
    plan, way = (read_json(path), []) if path.is_file() else (tune, ["tune"])
    if plan is None:
        return ()
    name = RESULTS_FILE if way else PLAN_FILE
    check = Checker(folder / name, "Write it with `moejax tune-cache -o json`.")
    # Commands print lists of records with -o json; a plan may stand alone in one.
    if isinstance(plan, list) and len(plan) == 1:
        plan, way = plan[0], [*way, 0]
    rows = check.sequence(check.mapping(plan, "the plan").get("tiers"), "tiers")
    tiers = tuple(
        _tier(check, row, f"tiers[{index}]", name, pointer(*way, "tiers", index))
        for index, row in enumerate(rows)
    )
    if len({len(tier.experts_per_layer) for tier in tiers}) > 1:
        raise check.fail("tiers have different numbers of layers")
    return tiers


def _tier(check: Checker, row: Any, where: str, file: str, pointer: str) -> Tier:
    row = check.mapping(row, where)
    experts = check.numbers(row, "experts_per_layer", where)
    return Tier(
        name=check.text(row, "name", where),
        memory=check.text(row, "memory", where),
        capacity_bytes=check.number(row, "capacity_bytes", where),
        experts_per_layer=tuple(int(number) for number in experts),
        file=file,
        pointer=pointer,
    )
