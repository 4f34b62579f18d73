"""Traces on disk: one `.safetensors` file with one JSON entry of metadata."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from moejax.errors import BadFileError, UsageError
from moejax.tensors import FileKind, map_tensors

from ._named import find_trace
from ._trace import Trace, hash_experts
from ._validate import naming, validate_trace

_KEY = "moejax"
_VERSION = 1
_HINT = "Write it anew with: moejax trace import or moejax trace make"
_KIND = FileKind(
    name="trace",
    dtypes=("U8", "U16", "F16", "I32", "I64"),
    # A dozen tensors and one line of metadata.
    max_header_bytes=2**20,
    hint=_HINT,
    zip_hint="If it is an .npz, run: moejax trace import FILE",
)
_EXPERT_TYPES = (np.uint8, np.uint16)
_TENSORS = {
    "experts": _EXPERT_TYPES,
    "request_start": (np.int64,),
    "phase": (np.uint8,),
    "routing_weights": (np.float16,),
    "token_ids": (np.int32,),
    "lookahead": _EXPERT_TYPES,
    "expert_bytes": (np.int64,),
}
_TEXTS = ("model", "source", "licence", "sha256")


def load_trace(path: str | Path) -> Trace:
    """Maps a trace file; arrays are read from disk as they are used.

    Args:
      path: A file, or the name of a trace that comes with moejax.

    Raises:
      BadFileError: The file is missing, corrupt, no trace, inconsistent, or was changed since
        it was written (its hash differs).
    """
    path = find_trace(path)
    tensors, metadata = map_tensors(path, _KIND)
    if set(metadata) != {_KEY}:
        raise BadFileError(f"{path} has no metadata of moejax", "Run: moejax trace import FILE")
    for name, array in tensors.items():
        if array.dtype not in _TENSORS.get(name, ()):
            raise BadFileError(
                f"{path}: tensor {name!r} of type {array.dtype} is not of a trace", _HINT
            )
    if not {"experts", "request_start"} <= set(tensors):
        raise BadFileError(f"{path} lacks the tensor experts or request_start", _HINT)
    # Hashing takes no less than reading everything, and validation reads it anyway.
    digest = hash_experts(tensors["experts"])
    fields = _read_metadata(path, metadata[_KEY])
    if fields["sha256"] != digest:
        raise BadFileError(
            f"{path}: experts have the hash {digest[:12]}..., not {fields['sha256'][:12]}...",
            "The file was changed after it was written. Import or make it anew.",
        )
    with naming(path, _HINT):
        trace = Trace(**tensors, **fields)
        validate_trace(trace)
    return trace


def save_trace(trace: Trace, path: str | Path) -> None:
    """Writes a trace, wholly or not at all; equal traces give equal bytes.

    Raises:
      BadFileError: The trace is not consistent with itself.
      UsageError: The file cannot be written.
    """
    path = Path(path)
    validate_trace(trace)
    tensors = {
        name: np.ascontiguousarray(getattr(trace, name))
        for name in _TENSORS
        if getattr(trace, name) is not None
    }
    metadata = {
        "version": _VERSION,
        "num_experts": trace.num_experts,
        "model": trace.model,
        "source": trace.source,
        "licence": trace.licence,
        "sha256": hash_experts(trace.experts),
        "is_router_order": trace.is_router_order,
        "workload": trace.workload,
        "warnings": list(trace.warnings),
    }
    content = save(tensors, {_KEY: json.dumps(metadata, sort_keys=True)})
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            "Give --out a path in a folder that exists and may be written to.",
        ) from error


def _read_metadata(path: Path, text: Any) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path}: the metadata of moejax is no JSON", _HINT) from error
    if not isinstance(fields, dict):
        raise BadFileError(f"{path}: the metadata of moejax is no table", _HINT)
    version = fields.pop("version", None)
    if version != _VERSION:
        raise BadFileError(
            f"{path} has version {version!r}, this moejax reads {_VERSION}",
            "Import it anew, or use the moejax that wrote it.",
        )
    expected = {*_TEXTS, "num_experts", "is_router_order", "workload", "warnings"}
    if set(fields) != expected:
        odd = ", ".join(sorted(set(fields) ^ expected))
        raise BadFileError(f"{path}: fields of the metadata are missing or unknown: {odd}", _HINT)
    warnings = fields["warnings"]
    is_sound = (
        all(isinstance(fields[key], str) for key in _TEXTS)
        and type(fields["num_experts"]) is int
        and isinstance(fields["is_router_order"], bool)
        and isinstance(fields["workload"], str | None)
        and isinstance(warnings, list)
        and all(isinstance(warning, str) for warning in warnings)
    )
    if not is_sound:
        raise BadFileError(f"{path}: a field of the metadata has the wrong kind of value", _HINT)
    return {**fields, "warnings": tuple(warnings)}
