"""Hardware profiles: the constants of one machine, each with its unit, kind and source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.errors import BadFileError

from ._places import HARDWARE, models_dir, read_card, unknown_name

CONSTANT_NAMES = (
    "vram_bytes",
    "vram_bytes_per_s",
    "matmul_flops",
    "kernel_efficiency_ratio",
    "layer_fixed_s",
    "step_fixed_s",
    "copy_latency_s",
    "pinned_h2d_bytes_per_s",
    "contention_ratio",
    "pageable_latency_s",
    "pageable_h2d_bytes_per_s",
    "host_copy_bytes_per_s",
    "nvme_latency_s",
    "nvme_bytes_per_s",
    "host_read_bytes_per_s",
    "host_expert_fixed_s",
    "overlap_ratio",
    "batched_layer_s",
    "prefetch_overlap_ratio",
    "all_reduce_latency_s",
    "all_reduce_bytes_per_s",
    "links_beside_ratio",
    "price_usd",
)
"""Every constant a profile may state; what the cost model needs and finds missing it names."""

_HINT = "Mend the value; `moejax fit` writes sound profiles."

KINDS = ("fitted", "measured", "derived", "datasheet", "assumed")
"""Where a value comes from, most trustworthy first."""


@dataclass(frozen=True)
class Constant:
    """One number about a machine.

    Attributes:
      value: The number, in `unit`.
      unit: Base unit, such as `s`, `B`, `B/s`, `FLOP/s`, `1` or `USD`.
      kind: One of `KINDS`.
      standard_error: Of a fitted value, in `unit`; None where there is none.
      source: Where the value was read or how it was obtained.
    """

    value: float
    unit: str
    kind: str
    standard_error: float | None
    source: str


@dataclass(frozen=True)
class Uncertainty:
    """How sure a fitted profile is; standard errors are those of its constants.

    Attributes:
      spread_ratio: Standard deviation of log(measured / predicted) over cases: what differs from
        case to case and from run to run though the constants are right.
      num_degrees: Degrees of freedom it was estimated with.
      names: Fitted constants whose errors depend on each other; a strategy's is `layer_s.NAME`.
      correlations: Between the logarithms of those, a row each.
    """

    spread_ratio: float
    num_degrees: int
    names: tuple[str, ...] = ()
    correlations: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Hardware:
    """What the cost model knows about one machine.

    Attributes:
      name: The profile's name, as given to `--hardware`.
      title: One line for reports; says what was fitted to whose measurements.
      constants: Constants by name, in the order of the file; never changed.
      source: Where the profile as a whole comes from.
      note: What a reader must know before trusting it.
      strategy_layer_s: What a strategy's program adds to every layer, by strategy; those that are
        not named add nothing that could be told apart.
      uncertainty: How sure the fit is; None where nobody knows, and then nothing has an interval.
    """

    name: str
    title: str
    constants: Mapping[str, Constant] = field(hash=False)
    source: str = ""
    note: str = ""
    strategy_layer_s: Mapping[str, Constant] = field(default_factory=dict, hash=False)
    uncertainty: Uncertainty | None = None

    def value(self, name: str) -> float:
        """The value of one constant, in its base unit.

        Raises:
          BadFileError: This profile does not state the constant.
        """
        if name not in self.constants:
            raise BadFileError(
                f"hardware profile {self.name!r} has no constant {name!r}",
                f"Add a [constants.{name}] table with value, unit, kind and source.",
            )
        return self.constants[name].value

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of every constant, by name."""
        return {name: constant.kind for name, constant in self.constants.items()}


def load_hardware(name_or_path: str | Path) -> Hardware:
    """Loads a hardware profile by name, or from a TOML or JSON file of the same layout.

    Raises:
      UsageError: No profile has this name; the hint lists close ones.
      BadFileError: The file cannot be read, or a constant is unknown, of unknown kind, not
        finite or not positive.
    """
    text = str(name_or_path)
    if text in HARDWARE:
        path = models_dir() / "hardware" / f"{text}.toml"
    elif text.endswith((".toml", ".json")) or "/" in text:
        path = Path(text)
    else:
        raise unknown_name("hardware", text, HARDWARE, "A path to a .toml profile works too.")
    return _read_hardware(read_card(path), path)


def _read_hardware(fields: Mapping[str, Any], path: Path) -> Hardware:
    tables = fields.get("constants")
    if not isinstance(tables, dict) or not tables:
        raise BadFileError(f"{path} has no [constants.NAME] tables", _HINT)
    constants = {name: _read_named(name, table, path) for name, table in tables.items()}
    layers = fields.get("strategy_layer_s", {})
    if not isinstance(layers, dict):
        raise BadFileError(f"{path}: strategy_layer_s = {layers!r} is not a table", _HINT)
    texts = {key: fields.get(key, "") for key in ("name", "title", "source", "note")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadFileError(f"{path}: {key} = {text!r} is not a text", _HINT)
    return Hardware(
        name=texts["name"] or path.stem,
        title=texts["title"] or texts["name"] or path.stem,
        constants=constants,
        strategy_layer_s={
            name: _read_constant(f"{path}: strategy_layer_s.{name}", name, table)
            for name, table in layers.items()
        },
        uncertainty=_read_uncertainty(fields.get("uncertainty"), path),
        source=texts["source"],
        note=texts["note"],
    )


def _read_named(name: str, table: Any, path: Path) -> Constant:
    where = f"{path}: constants.{name}"
    if name not in CONSTANT_NAMES:
        raise BadFileError(f"{where} is not a known constant", f"Known: {_listed(CONSTANT_NAMES)}.")
    return _read_constant(where, name, table)


def _read_constant(where: str, name: str, table: Any) -> Constant:
    if not isinstance(table, dict):
        raise BadFileError(f"{where} is not a table", "State value, unit, kind and source.")
    for key in ("unit", "kind", "source"):
        if not isinstance(table.get(key), str) or not table[key]:
            raise BadFileError(f"{where} lacks {key!r}", "State value, unit, kind and source.")
    if table["kind"] not in KINDS:
        raise BadFileError(f"{where}: kind {table['kind']!r} is unknown", f"Use {_listed(KINDS)}.")
    value = _number(table.get("value"), where)
    # No overlap at all is a sound answer; every other constant divides or scales something.
    if value < 0 or (value == 0 and name != "overlap_ratio"):
        raise BadFileError(f"{where} = {value} must be positive", _HINT)
    if name.endswith("_ratio") and value > 1:
        raise BadFileError(f"{where} = {value} is a ratio and cannot exceed 1", _HINT)
    error = table.get("standard_error")
    if error is not None:
        error = _number(error, f"{where}.standard_error")
        if error < 0:
            raise BadFileError(f"{where}.standard_error = {error} must not be negative", _HINT)
    return Constant(value, table["unit"], table["kind"], error, table["source"])


def _read_uncertainty(table: Any, path: Path) -> Uncertainty | None:
    if table is None:
        return None
    where = f"{path}: uncertainty"
    if not isinstance(table, dict):
        raise BadFileError(f"{where} = {table!r} is not a table", _HINT)
    spread = _number(table.get("spread_ratio"), f"{where}.spread_ratio")
    num_degrees = _number(table.get("num_degrees"), f"{where}.num_degrees")
    names, rows = table.get("names", []), table.get("correlations", [])
    is_square = isinstance(names, list) and isinstance(rows, list) and len(rows) == len(names)
    if not is_square or any(not isinstance(row, list) or len(row) != len(names) for row in rows):
        raise BadFileError(f"{where}.correlations is not one row for each of names", _HINT)
    if spread < 0 or num_degrees < 1:
        raise BadFileError(
            f"{where}: a spread of {spread} from {num_degrees} degrees of freedom is none", _HINT
        )
    correlations = tuple(
        tuple(_number(value, f"{where}.correlations") for value in row) for row in rows
    )
    if any(abs(value) > 1 for row in correlations for value in row):
        raise BadFileError(f"{where}.correlations exceed 1", _HINT)
    return Uncertainty(spread, int(num_degrees), tuple(map(str, names)), correlations)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadFileError(f"{where} = {value!r} is not a number", _HINT)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadFileError(f"{where} = {value} is not finite", _HINT)
    return number


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
