"""What `moejax bench --full` adds to a run, as read back from `results.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ._check import Checker
from ._places import pointer

EXPERIMENTS = ("capacities", "gpus", "models", "hybrids", "top_k")
"""Keys in `results.json`, in the order of the report."""

_FIELDS = (*("latency_s", "p99_s", "hit_ratio", "fetched_bytes", "memory_bytes", "num_prefetches"),)
_HEADS: Mapping[str, tuple[str, ...]] = {
    "capacities": (),
    "gpus": ("hardware", "cache"),
    "models": ("model",),
    "hybrids": ("host",),
    "top_k": ("reading",),
}
_ROOM = (
    *("batch_size", "num_experts", "dense_bytes", "kv_bytes", "workspace_bytes"),
    *("staging_bytes", "context_tokens"),
)
_MODEL = ("num_moe_layers", "num_experts", "num_experts_per_tok", "expert_bytes", "routed_bytes")


@dataclasses.dataclass(frozen=True)
class FurtherCell:
    """One strategy at one batch and cache size of one experiment.

    Attributes:
      strategy: Its name, or that of a hybrid.
      batch_size: Requests in lockstep.
      slots: Of a layer.
      head: What else tells it apart: card, model, share, reading.
      values: By field, one a draw of requests; bytes and seconds are means a step.
      pointer: Where it stands in `results.json`.
    """

    strategy: str
    batch_size: int
    slots: int
    head: Mapping[str, Any]
    values: Mapping[str, Float[np.ndarray, " draws"]]
    pointer: str

    def mean(self, field: str) -> float:
        """Mean over draws."""
        return float(self.values[field].mean())


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Cells, what they were run with, and the facts beside them as the file has them."""

    settings: Mapping[str, Any]
    cells: tuple[FurtherCell, ...]
    facts: Mapping[str, Any]

    def where(self, **wanted: Any) -> tuple[FurtherCell, ...]:
        """Cells whose fields or head have these values, in the order of the file."""
        return tuple(cell for cell in self.cells if _matches(cell, wanted))

    def strategies(self) -> tuple[str, ...]:
        """Names in the order of the file."""
        return tuple(dict.fromkeys(cell.strategy for cell in self.cells))

    def batch_sizes(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))


Further = Mapping[str, Experiment]
"""By key; a run without `--full` has none."""


def read_further(check: Checker, content: Mapping[str, Any]) -> Further:
    """Reads the experiments that a run has.

    Raises:
      BadFileError: A field is missing or wrong.
    """
    return {
        name: _experiment(check, content[name], name) for name in EXPERIMENTS if name in content
    }


def _matches(cell: FurtherCell, wanted: Mapping[str, Any]) -> bool:
    return all(
        (cell.head[name] if name in cell.head else getattr(cell, name, None)) == value
        for name, value in wanted.items()
    )


def _experiment(check: Checker, content: Any, name: str) -> Experiment:
    content = check.mapping(content, name)
    rows = check.sequence(content.get("cells"), f"{name}.cells")
    if not rows:
        raise check.fail(f"{name}.cells is empty")
    facts = {key: value for key, value in content.items() if key not in ("cells", "settings")}
    _check_facts(check, name, facts)
    return Experiment(
        settings=check.mapping(content.get("settings"), f"{name}.settings"),
        cells=tuple(_cell(check, row, name, index) for index, row in enumerate(rows)),
        facts=facts,
    )


def _cell(check: Checker, row: Any, experiment: str, index: int) -> FurtherCell:
    where = f"{experiment}.cells[{index}]"
    row = check.mapping(row, where)
    for name in _HEADS[experiment]:
        check.text(row, name, where)
    values = {name: np.array(check.numbers(row, name, where)) for name in _FIELDS}
    lengths = {len(column) for column in values.values()}
    if len(lengths) != 1 or 0 in lengths or not values["latency_s"].all():
        raise check.fail(f"{where} has no draws, not the same in every field, or a latency of 0")
    own = ("strategy", "batch_size", "slots")
    return FurtherCell(
        check.text(row, "strategy", where),
        check.count(row, "batch_size", where),
        check.count(row, "slots", where),
        {
            key: value
            for key, value in row.items()
            if not isinstance(value, list) and key not in own
        },
        values,
        pointer(experiment, "cells", index),
    )


def _check_facts(check: Checker, name: str, facts: Mapping[str, Any]) -> None:
    """Refuses an experiment without what its tables are made from."""
    if name == "gpus":
        for index, card in enumerate(check.sequence(facts.get("cards"), "gpus.cards")):
            where = f"gpus.cards[{index}]"
            card = check.mapping(card, where)
            check.text(card, "name", where)
            check.number(card, "vram_bytes", where, is_positive=True)
            if card.get("price_usd") is not None:
                check.number(card, "price_usd", where, is_positive=True)
                check.text(card, "price_source", where)
        for key in ("rooms", "rooms_of_models"):
            for index, room in enumerate(check.sequence(facts.get(key), f"gpus.{key}")):
                _check_room(check, room, f"gpus.{key}[{index}]")
    if name == "models":
        for index, model in enumerate(check.sequence(facts.get("models"), "models.models")):
            where = f"models.models[{index}]"
            model = check.mapping(model, where)
            check.text(model, "model", where)
            for field in _MODEL:
                check.number(model, field, where, is_positive=True)
    if name == "hybrids":
        parts = check.mapping(facts.get("parts"), "hybrids.parts")
        for hybrid, names in parts.items():
            if not check.sequence(names, f"hybrids.parts.{hybrid}"):
                raise check.fail(f"hybrids.parts.{hybrid} is empty")


def _check_room(check: Checker, room: Any, where: str) -> None:
    room = check.mapping(room, where)
    for field in ("hardware", "model"):
        check.text(room, field, where)
    for field in _ROOM:
        check.number(room, field, where)
    if room.get("slots_that_fit") is not None:
        check.count(room, "slots_that_fit", where)
