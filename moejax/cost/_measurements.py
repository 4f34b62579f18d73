"""Reads CSV files of published or measured copies.

Columns `direction`, `host_memory`, `bytes` and one of `seconds`, `gb_per_s` are needed; `gpu`,
`source`, `note`, `rig`, `time_domain`, `num_copies` and `used_for` are read where they are there.
Files without the last four say the same in words, so rows then take the rig from the repository
in `source`, and time domain and number of copies from phrases of `note`.
"""

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

from moejax.errors import BadFileError

_MAX_CSV_BYTES = 64 * 2**20
_NEEDED = ("direction", "host_memory", "bytes")
_DOMAIN_WORDS = (
    ("host_call", ("host api", "api call")),
    ("end_to_end", ("end-to-end", "end to end", "sustained", "synchronis")),
    ("pipeline", ("pipeline",)),
)


class TransferRow(NamedTuple):
    """One copy, or one of several equal copies, as measured somewhere.

    Attributes:
      gpu: Card, as the file spells it.
      rig: Machine it was measured on; rows of different rigs are different populations.
      direction: `h2d`, `d2h`, `h2d|d2h` where a source quotes both as one range, or another path.
      memory: Host memory class, such as `pinned` or `pageable`.
      num_bytes: Bytes of one copy; None where the source gives only a rate.
      time_s: Time of one copy; None where the source gives only a rate.
      bytes_per_s: `num_bytes / time_s`, or the rate as quoted.
      time_domain: `device` (CUDA events), `host_call`, `end_to_end` or `pipeline`.
      used_for: What the file wants the row to be used for; empty when it does not say.
      source: Where the row was published.
      note: Conditions of the measurement.
    """

    gpu: str
    rig: str
    direction: str
    memory: str
    num_bytes: float | None
    time_s: float | None
    bytes_per_s: float
    time_domain: str
    used_for: str
    source: str
    note: str


def read_transfers(path: str | Path) -> tuple[TransferRow, ...]:
    """Reads the copies of a CSV file; rows with neither a time nor a rate are left out.

    Raises:
      BadFileError: The file is missing, unreadable or lacks a column, or a number is not finite
        and positive.
    """
    path = Path(path)
    rows = []
    for line, fields in read_csv(path, _NEEDED):
        where = f"{path}, line {line}"
        num_bytes = _number(fields, "bytes", where)
        time_s = _number(fields, "seconds", where)
        rate = _number(fields, "gb_per_s", where)
        if time_s is None and rate is None:
            continue
        note = fields.get("note", "")
        num_copies = _number(fields, "num_copies", where) or _copies_in(note)
        bytes_per_s = 1e9 * rate if rate is not None else None
        if num_bytes is not None:
            num_bytes /= num_copies
            time_s = time_s / num_copies if time_s is not None else num_bytes / (bytes_per_s or 1.0)
            # Reads that wait in a queue take longer than their share of the quoted rate.
            bytes_per_s = bytes_per_s or num_bytes / time_s
        if bytes_per_s is None:
            continue
        source = fields.get("source", "")
        rows.append(
            TransferRow(
                gpu=fields.get("gpu", ""),
                rig=fields.get("rig", "") or source.split(" ")[0],
                direction=fields["direction"],
                memory=fields["host_memory"],
                num_bytes=num_bytes,
                time_s=time_s if num_bytes is not None else None,
                bytes_per_s=bytes_per_s,
                time_domain=fields.get("time_domain", "") or _domain_in(note),
                used_for=fields.get("used_for", ""),
                source=source,
                note=note,
            )
        )
    if not rows:
        raise BadFileError(f"{path} holds no copy", "Give bytes and seconds or gb_per_s per row.")
    return tuple(rows)


def read_csv(path: Path, needed: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with their line numbers; every field is a stripped text.

    Raises:
      BadFileError: The file is missing, unreadable, too large, lacks a column or has a ragged row.
    """
    try:
        if not path.is_file():
            raise BadFileError(f"{path} is not a file", "Give the path of a CSV file.")
        if path.stat().st_size > _MAX_CSV_BYTES:
            raise BadFileError(
                f"{path} has {path.stat().st_size} bytes: too large for a table",
                f"At most {_MAX_CSV_BYTES} bytes are read.",
            )
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise BadFileError(
                    f"{path} has no column {', '.join(missing)}",
                    f"The first line must name the columns {', '.join(needed)}.",
                )
            rows = []
            for fields in reader:
                if None in fields or None in fields.values():
                    raise BadFileError(
                        f"{path}, line {reader.line_num}: not as many fields as the header",
                        "Quote texts that contain commas.",
                    )
                rows.append((reader.line_num, {key: fields[key].strip() for key in fields}))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadFileError(
            f"{path} cannot be read: {error}", "Measurements are CSV in UTF-8 with a header line."
        ) from error


def _number(fields: dict[str, str], name: str, where: str) -> float | None:
    text = fields.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise BadFileError(
            f"{where}: {name} = {text!r} is not a finite positive number",
            "Correct the row, or leave the field empty where nothing was measured.",
        )
    return value


def _copies_in(note: str) -> float:
    match = re.search(r"\b(\d+) copies of \d+ bytes|\b(\d+) x \d+ MiB", note)
    return float(match[1] or match[2]) if match else 1.0


def _domain_in(note: str) -> str:
    text = note.lower()
    if "device (cuda event)" in text:
        return "device"
    for domain, words in _DOMAIN_WORDS:
        if any(word in text for word in words):
            return domain
    return "device"
