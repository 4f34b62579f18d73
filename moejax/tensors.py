"""Safetensors files: a reader that believes nothing a header says, and a streaming writer.

Every length, offset, type and shape of a header is checked against the size of the file before
anything else is read. Traces are then mapped, and checkpoints read tensor by tensor into arrays
of their own: pages of a mapping count as memory of the process once they were touched, so mapping
28 GB of weights would hold them twice, and what is read with `read` leaves nothing behind.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from moejax.errors import BadFileError

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "U8": np.dtype("<u1"),
        "U16": np.dtype("<u2"),
        "I32": np.dtype("<i4"),
        "I64": np.dtype("<i8"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype("<f4"),
    }
)
"""Types that moejax reads and writes, by their name in a header."""

# What the format itself allows; a kind of file may allow less.
FORMAT_HEADER_BYTES = 100 * 10**6
_MAX_DIMS = 8
_HEADER_ALIGNMENT_BYTES = 8


class FileKind(NamedTuple):
    """What a reader expects of a file, and how it speaks of one that is otherwise.

    Attributes:
      name: What a sound file is, such as `trace`.
      dtypes: Names of the tensor types it may hold, keys of `DTYPES`.
      max_header_bytes: Longest header that is parsed.
      hint: What to do about an unsound file.
      zip_hint: What to do about a zip archive, the format that others keep such data in.
    """

    name: str
    dtypes: tuple[str, ...]
    max_header_bytes: int
    hint: str
    zip_hint: str


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    Attributes:
      path: The file that holds it.
      dtype: Type of its elements.
      shape: Lengths of its axes; it is stored in C order.
      offset_bytes: Its first byte, counted from the beginning of the file.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorShape(NamedTuple):
    """What a header says of a tensor that is yet to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path, kind: FileKind) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Finds every tensor of a file, and reads none.

    Returns:
      The tensors by name, and the metadata, whose values may be anything.

    Raises:
      BadFileError: The file cannot be opened, or its header is not exactly that of a sound file.
    """
    with _refusing(path, kind):
        header, begin, num_data_bytes = _open(path, kind)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            _fail(path, kind, "its metadata is no table")
        tensors = {name: _locate(path, kind, name, entry) for name, entry in header.items()}
        _check_cover(path, kind, list(tensors.values()), num_data_bytes)
        return {
            name: info._replace(offset_bytes=begin + info.offset_bytes)
            for name, info in tensors.items()
        }, metadata


def map_tensors(path: Path, kind: FileKind) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Maps every tensor of a file; pages are read from disk as they are used.

    Returns:
      Read-only views of the mapped tensors by name, and the metadata,
      whose values may be anything.

    Raises:
      BadFileError: The file cannot be opened, or its header is not exactly that of a sound file.
    """
    tensors, metadata = read_header(path, kind)
    with _refusing(path, kind):
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=0))
        return {
            name: np.ndarray(info.shape, info.dtype, buffer=data, offset=info.offset_bytes)
            for name, info in tensors.items()
        }, metadata


def write_tensors(
    path: Path,
    shapes: Mapping[str, TensorShape],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file with one tensor in memory at a time.

    Args:
      path: The file; what it held is lost.
      shapes: Type and shape of each tensor by name, enough to write the header.
      make: Gives the tensor of a name; called once for each, in the order of the file.
      metadata: Texts for the header.

    Raises:
      OSError: The file cannot be written.
      ValueError: `make` gave another type or shape than announced.
    """
    # Wide types first, as the public library writes them, so that each tensor is aligned.
    names = sorted(shapes, key=lambda name: -shapes[name].dtype.itemsize)
    with open(path, "wb") as file:
        file.write(_header(names, shapes, metadata))
        for name in names:
            array = make(name)
            if TensorShape(array.dtype, array.shape) != shapes[name]:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {shapes[name]}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def parse_table(content: bytes) -> dict[str, Any]:
    """Parses strict JSON: a table, no name twice, no NaN or infinity.

    Raises:
      ValueError: It is anything else; the message says what.
      RecursionError: It is nested too deeply.
    """
    table = json.loads(
        content.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant
    )
    if not isinstance(table, dict):
        raise ValueError("it holds no table")
    return table


def _open(path: Path, kind: FileKind) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begin, and how many bytes of data there are."""
    # A pipe or a device would block or never end, hence the question before opening.
    if not stat.S_ISREG(os.stat(path).st_mode):
        _fail(path, kind, "it is not a file")
    with open(path, "rb") as file:
        num_file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        num_header_bytes = int.from_bytes(prefix, "little")
        if prefix.startswith(b"PK"):
            _fail(path, kind, "it is a zip archive", kind.zip_hint)
        if len(prefix) < 8 or not 2 <= num_header_bytes <= kind.max_header_bytes:
            _fail(path, kind, "it does not begin like a safetensors file")
        begin = 8 + num_header_bytes
        if num_file_bytes < begin:
            _fail(path, kind, "its header is cut off")
        header = parse_table(file.read(num_header_bytes))
    if num_file_bytes == begin:
        _fail(path, kind, "it holds no data")
    return header, begin, num_file_bytes - begin


def _locate(path: Path, kind: FileKind, name: str, entry: Any) -> TensorInfo:
    """Reads one entry; its offset counts from the beginning of the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(path, kind, f"the entry of {name!r} is not dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in kind.dtypes:
        known = ", ".join(kind.dtypes)
        _fail(path, kind, f"{name!r} has type {entry['dtype']!r}, which is none of {known}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        # bool is an int to Python, but `true` is no length.
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            _fail(path, kind, f"{name!r} has a shape or offset that is no list of whole numbers")
    if len(shape) > _MAX_DIMS or len(offsets) != 2:
        _fail(path, kind, f"{name!r} has too many dimensions or offsets")
    info = TensorInfo(path, DTYPES[entry["dtype"]], tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != info.num_bytes:
        _fail(
            path, kind, f"{name!r} of shape {shape} does not fill bytes {offsets[0]}..{offsets[1]}"
        )
    return info


def _check_cover(path: Path, kind: FileKind, tensors: list[TensorInfo], num_bytes: int) -> None:
    """Tensors must lie end to end: no hole, no overlap, nothing cut off or left over."""
    end = 0
    for info in sorted(tensors, key=lambda info: (info.offset_bytes, info.num_bytes)):
        if info.offset_bytes != end:
            _fail(path, kind, f"its tensors overlap or leave a hole at byte {info.offset_bytes}")
        end += info.num_bytes
    if end != num_bytes:
        _fail(path, kind, f"it holds {num_bytes} bytes of data where the header announces {end}")


def _header(
    names: list[str], shapes: Mapping[str, TensorShape], metadata: Mapping[str, str]
) -> bytes:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + shapes[name].num_bytes
        entries[name] = {
            "dtype": codes[shapes[name].dtype],
            "shape": list(shapes[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("it names something twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}")


@contextmanager
def _refusing(path: Path, kind: FileKind) -> Iterator[None]:
    """Turns what a hostile file may provoke into an error that names it."""
    try:
        yield
    except OSError as error:
        _fail(path, kind, error.strerror or str(error))
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        _fail(path, kind, str(error) or type(error).__name__)


def _fail(path: Path, kind: FileKind, cause: str, hint: str = "") -> NoReturn:
    raise BadFileError(f"{path} is not a sound {kind.name}: {cause}", hint or kind.hint)
