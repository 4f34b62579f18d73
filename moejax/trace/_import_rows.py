"""Routing as text, a row per routed expert (CSV) or per token and layer (JSONL)."""

import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PureWindowsPath
from typing import NoReturn

import numpy as np

from moejax.errors import BadFileError

from ._import_npz import guessed_warning, is_descending
from ._trace import MAX_EXPERTS, Trace, expert_dtype, not_computed

_SPELLINGS = {
    "token": ("token", "token_idx", "step"),
    "layer": ("layer", "layer_idx"),
    "expert": ("expert", "expert_id"),
    "weight": ("weight", "gate_weight"),
    "rank": ("slot", "rank"),
    "request": ("request", "request_idx", "turn"),
    "phase": ("phase",),
}
_REQUIRED = ("token", "layer", "expert")
_MAX_LAYERS = 4096
# A sound file fills every (token, layer); one that leaves most of them empty is something else.
_MAX_CELLS_PER_ROW = 256
_NUM_EXPERTS = re.compile(r"\bn_expert=(\d{1,9})\b")
_MODEL = re.compile(r"\bmodel=(\S+)")
_EXPERT_BYTES = re.compile(r"\blayer=(\d{1,9})\s+expert_bytes=(\d{1,15})\b")


def read_csv(
    path: Path, model: str | None, num_experts: int | None, source: str, licence: str
) -> Trace:
    """Reads route rows with a header line; see `import_trace`."""
    comments: list[str] = []
    lines = _data_lines(path, comments)
    try:
        header = next(csv.reader([next(lines, "")]), [])
        columns = _columns([name.strip().lower() for name in header])
        first = next(lines, None)
        if first is None:
            _fail("it has no row")
        table = np.loadtxt(
            chain([first], lines),
            delimiter=",",
            usecols=list(columns.values()),
            ndmin=2,
            dtype=np.float64,
        )
    except (ValueError, csv.Error) as error:
        _fail(str(error).splitlines()[0])
    rows = dict(zip(columns, table.T, strict=True))
    about = "\n".join(comments)
    stated, named = _NUM_EXPERTS.search(about), _MODEL.search(about)
    if num_experts is None and stated:
        num_experts = int(stated[1])
    if model is None and named:
        model = PureWindowsPath(named[1]).name.removesuffix(".gguf")
    expert_bytes = {int(layer): int(size) for layer, size in _EXPERT_BYTES.findall(about)}
    return _from_rows(rows, model, num_experts, source, licence, expert_bytes)


def read_jsonl(
    path: Path, model: str | None, num_experts: int | None, source: str, licence: str
) -> Trace:
    """Reads one object per token and layer; see `import_trace`."""
    keys, lengths, experts, weights = [], [], [], []
    for number, line in enumerate(_data_lines(path, []), start=1):
        try:
            record = json.loads(line)
            ids = record["selected_ids"]
            gates = record.get("gate_weights")
            keys.append((record.get("request_idx", 0), record["token_idx"], record["layer_idx"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _fail(f"record {number} lacks its fields ({type(error).__name__})")
        if not isinstance(ids, list) or (gates is not None and not isinstance(gates, list)):
            _fail(f"record {number}: selected_ids or gate_weights is no list")
        if gates is not None and len(gates) != len(ids):
            _fail(f"record {number} has {len(ids)} experts and {len(gates)} weights")
        lengths.append(len(ids))
        experts.extend(ids)
        weights.extend([None] * len(ids) if gates is None else gates)
    try:
        key = np.repeat(np.array(keys, np.float64).reshape(-1, 3), lengths, axis=0)
        rows = {"request": key[:, 0], "token": key[:, 1], "layer": key[:, 2]}
        rows["expert"] = np.array(experts, np.float64)
        if all(weight is not None for weight in weights):
            rows["weight"] = np.array(weights, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        _fail(str(error).splitlines()[0])
    if not experts:
        _fail("it names no expert")
    if any(values.ndim != 1 for values in rows.values()):
        _fail("an expert or weight is a list, not a number")
    return _from_rows(rows, model, num_experts, source, licence, {})


def _from_rows(
    rows: dict[str, np.ndarray],
    model: str | None,
    num_experts: int | None,
    source: str,
    licence: str,
    expert_bytes: dict[int, int],
) -> Trace:
    """Sorts rows, one routed expert each, into [tokens, layers, topk]."""
    whole = {name: _whole(name, rows[name]) for name in rows if name != "weight"}
    num_rows = whole["expert"].size
    request = whole.get("request", np.zeros(num_rows, np.int64))
    # A prompt and the answer to it both count from 0 in some recordings.
    phase = whole.get("phase", np.zeros(num_rows, np.int64))
    if phase.max() > 1:
        _fail(f"phase {phase.max()} is neither 0 nor 1")
    keys, token = np.unique(
        np.stack([request, phase, whole["token"]], axis=1), axis=0, return_inverse=True
    )
    token = token.reshape(-1)
    layers, layer = np.unique(whole["layer"], return_inverse=True)
    rank = whole.get("rank", np.zeros(num_rows, np.int64))
    order = np.lexsort((np.arange(num_rows), rank, layer, token))
    cell = token[order] * layers.size + layer[order]
    place = np.arange(num_rows) - np.searchsorted(cell, cell)
    shape = (keys.shape[0], layers.size, int(place.max()) + 1)
    if (
        layers.size > _MAX_LAYERS
        or np.prod(shape, dtype=np.float64) > _MAX_CELLS_PER_ROW * num_rows
    ):
        _fail(f"{num_rows} rows do not fill {shape[0]} tokens x {shape[1]} layers")
    largest = int(whole["expert"].max())
    warnings = () if num_experts is not None else (guessed_warning(largest + 1),)
    num_experts = largest + 1 if num_experts is None else num_experts
    if not largest < num_experts <= MAX_EXPERTS:
        _fail(f"expert {largest} is not one of {num_experts} (at most {MAX_EXPERTS})")
    experts = np.full(shape, not_computed(np.empty(0, expert_dtype(num_experts))), np.int64)
    experts[token[order], layer[order], place] = whole["expert"][order]
    experts = experts.astype(expert_dtype(num_experts))
    weights = None
    if "weight" in rows:
        weights = np.zeros(shape, np.float16)
        with np.errstate(over="ignore", invalid="ignore"):
            weights[token[order], layer[order], place] = rows["weight"][order]
    is_start = np.r_[True, keys[1:, 0] != keys[:-1, 0]]
    has_bytes = bool(expert_bytes) and all(int(layer) in expert_bytes for layer in layers)
    return Trace(
        experts=experts,
        num_experts=num_experts,
        request_start=np.append(np.flatnonzero(is_start), keys.shape[0]).astype(np.int64),
        phase=keys[:, 1].astype(np.uint8) if "phase" in whole else None,
        routing_weights=weights,
        expert_bytes=(
            np.array([expert_bytes[int(layer)] for layer in layers], np.int64)
            if has_bytes
            else None
        ),
        model=model or "",
        source=source,
        licence=licence,
        is_router_order="rank" in whole
        or (weights is not None and is_descending(experts, weights, num_experts)),
        warnings=warnings,
    )


def _data_lines(path: Path, comments: list[str]) -> Iterator[str]:
    """Lines that are neither blank nor comments; comments are collected."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if line.startswith("#"):
                    comments.append(line)
                elif line.strip():
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        _fail(str(error))


def _columns(header: list[str]) -> dict[str, int]:
    columns = {
        name: header.index(spelling)
        for name, spellings in _SPELLINGS.items()
        for spelling in reversed(spellings)
        if spelling in header
    }
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        _fail(f"its header has no column {missing[0]!r}")
    return columns


def _whole(name: str, values: np.ndarray) -> np.ndarray:
    # 2**53 bounds whole numbers in float64.
    is_sound = np.isfinite(values) & (values >= 0) & (values < 2**53) & (values % 1 == 0)
    if not is_sound.all():
        _fail(f"{name} {values[~is_sound][0]:g} is no whole number from 0 on")
    return values.astype(np.int64)


def _fail(cause: str) -> NoReturn:
    raise BadFileError(
        f"no routing: {cause}",
        "CSV needs columns token, layer, expert; JSONL needs token_idx, layer_idx, selected_ids.",
    )
