"""The card of a synthetic workload."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from moejax.cards import models_dir
from moejax.errors import BadFileError

Figures: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Statistics by measure and name: `hit_ratio_warm` -> `lru` -> slots -> ratio, or
`statistics` -> `reuse_ratio` -> value (achieved) or [lowest, highest] (target)."""


@dataclass(frozen=True)
class Workload:
    """A recipe for routing: which synthetic router, with which parameters, fitted to what.

    Attributes:
      name: Key in `WORKLOADS` and file name of the card.
      title: What a figure or table calls it.
      model: Card of the model whose shape it takes.
      num_layers: MoE layers.
      num_experts: Routed experts of a layer.
      num_experts_per_tok: Experts that a token demands in a layer.
      router: `latent`, `pattern` or `uniform`.
      model_seed: Fixes routers, biases and embeddings; the seed of a trace draws only requests.
      parameters: The router's numbers.
      fitted: Names of the parameters that `calibrate` may move.
      targets: Published figures that the parameters were fitted to.
      achieved: The same figures of the workload itself, on requests not used in the fit.
      source: Where the targets come from.
      note: What the workload is good for and what it is not.
      gated_slots: Slots of a layer at which the hit ratios must meet their targets; without any,
        LRU and Belady must with twice the slots of one token's experts.
    """

    name: str
    title: str
    model: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    router: str
    model_seed: int
    parameters: Mapping[str, float]
    fitted: tuple[str, ...]
    targets: Figures
    achieved: Figures
    source: str
    note: str
    gated_slots: tuple[int, ...] = ()


def read_workload(name_or_path: str | Path) -> Workload:
    """Reads the card of a workload.

    Args:
      name_or_path: A file, or the name of a card under `models/workloads/`.

    Raises:
      BadFileError: The file is missing, is not TOML, or its fields are not those of a workload.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = models_dir() / "workloads" / f"{name_or_path}.toml"
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFileError(
            f"{path} is not a readable workload card: {error}",
            "Write it again with scripts/calibrate_workload.py or restore it.",
        ) from error
    for table in ("parameters", "targets", "achieved"):
        fields[table] = _read_only(fields.get(table, {}))
    for names in ("fitted", "gated_slots"):
        fields[names] = tuple(fields.get(names, ()))
    try:
        return Workload(**fields)
    except TypeError as error:
        raise BadFileError(
            f"{path} does not have the fields of a workload: {error}",
            "Compare it with models/workloads/qwen1.5-moe.toml.",
        ) from error


def _read_only(table: Mapping[str, Any]) -> Mapping[Any, Any]:
    # Slot counts are keys, and TOML keys are text.
    return MappingProxyType(
        {
            int(key) if key.isdecimal() else key: (
                _read_only(value) if isinstance(value, Mapping) else value
            )
            for key, value in table.items()
        }
    )
