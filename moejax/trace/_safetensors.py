"""A safetensors reader that maps the file and believes nothing it says.

The public reader copies tensors; this one hands out views of the mapped file. Every length,
offset, type and shape of the header is checked against the size of the file first.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moejax.errors import BadFileError

# A dozen tensors and one line of metadata; the format itself allows 100 MB.
_MAX_HEADER_BYTES = 2**20
_DTYPES = {"U8": "|u1", "U16": "<u2", "F16": "<f2", "I32": "<i4", "I64": "<i8"}


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Maps every tensor of a safetensors file.

    Returns:
      Read-only views of the mapped tensors by name, and the metadata,
      whose values may be anything.

    Raises:
      BadFileError: The file cannot be opened, or its header is not exactly that of a sound file.
    """
    try:
        data, header = _open(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            _fail(path, "its metadata is no table")
        spans = {name: _span(path, name, entry) for name, entry in header.items()}
        _check_cover(path, [span[:2] for span in spans.values()], data.size)
        tensors = {
            name: np.ndarray(shape, dtype, buffer=data, offset=begin)
            for name, (begin, _, dtype, shape) in spans.items()
        }
    except OSError as error:
        _fail(path, error.strerror or str(error))
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        _fail(path, str(error) or type(error).__name__)
    return tensors, metadata


def _open(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    status = os.stat(path)
    # A pipe or a device would block or never end.
    if not stat.S_ISREG(status.st_mode):
        _fail(path, "it is not a file")
    with open(path, "rb") as file:
        prefix = file.read(8)
        num_header_bytes = int.from_bytes(prefix, "little")
        if prefix.startswith(b"PK"):
            _fail(path, "it is a zip archive, such as an .npz", "Run: moejax trace import FILE")
        if len(prefix) < 8 or not 2 <= num_header_bytes <= _MAX_HEADER_BYTES:
            _fail(path, "it does not begin like a safetensors file")
        text = file.read(num_header_bytes)
    if len(text) < num_header_bytes:
        _fail(path, "its header is cut off")
    header = json.loads(
        text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant
    )
    if not isinstance(header, dict):
        _fail(path, "its header is no table")
    begin = 8 + num_header_bytes
    if status.st_size <= begin:
        _fail(path, "it holds no data")
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
    return np.asarray(mapped)[begin:], header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        _fail(path, f"{name!r} has type {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        # bool is an int to Python, but `true` is no length.
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            _fail(path, f"{name!r} has a shape or offset that is no list of whole numbers")
    if len(shape) > 4 or len(offsets) != 2:
        _fail(path, f"{name!r} has too many dimensions or offsets")
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        _fail(path, f"{name!r} of shape {shape} does not fill bytes {offsets[0]}..{offsets[1]}")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _check_cover(path: Path, spans: list[tuple[int, int]], num_bytes: int) -> None:
    """Tensors must lie end to end: no hole, no overlap, nothing cut off or left over."""
    end = 0
    for begin, next_end in sorted(spans):
        if begin != end:
            _fail(path, f"its tensors overlap or leave a hole at byte {begin}")
        end = next_end
    if end != num_bytes:
        _fail(path, f"it holds {num_bytes} bytes of data where the header announces {end}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header names something twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"its header holds {text}")


def _fail(path: Path, cause: str, hint: str = "") -> NoReturn:
    raise BadFileError(
        f"{path} is not a sound trace: {cause}",
        hint or "Write it anew with: moejax trace import or moejax trace make",
    )
