"""Files that are either whole or not there: written beside their place, then renamed into it."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from moejax.errors import BadFileError, UsageError

from ._plain import to_plain


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes `data` so that a reader sees the old file or the new one, never half of it.

    Missing folders are made. A link is followed, and a device or pipe such as `/dev/stdout` is
    written to, not replaced.

    Returns:
      The path as given.

    Raises:
      UsageError: The place is a folder or cannot be written.
    """
    target = Path(path).resolve()
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            "Name a file in a folder that you may write to, on a disk with room.",
        ) from error
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text with Unix line ends, as `write_bytes` does.

    Raises:
      UsageError: The place is a folder or cannot be written.
    """
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON, as `write_bytes` does; see `to_plain` for what it may hold.

    Raises:
      UsageError: The place is a folder or cannot be written.
    """
    return write_text(path, json.dumps(to_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
      BadFileError: The file is missing, unreadable, not UTF-8, not JSON, nested beyond reason, or
        holds NaN or an infinity.
    """
    try:
        return json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise BadFileError(
            f"{path} cannot be read: {error.strerror or error}", "Check the path and its rights."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError(
            f"{path} is not JSON: {error}", "It may be cut off or damaged: make it again."
        ) from error


def _replace(target: Path, data: bytes) -> None:
    scratch = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(scratch, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
