"""The folder of a sweep: its settings, a file for every finished shard, and the results."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moejax
from moejax.errors import BadFileError, UsageError
from moejax.results import capture_environment, read_json, to_plain, write_json
from moejax.trace import Trace

from ._sweep import Shard, SweepSettings

SWEEP_SCHEMA = "moejax.sweep/1"
_SETTINGS, _SHARDS, _RESULTS = "sweep.json", "shards", "results.json"


def describe_sweep(
    settings: SweepSettings, trace: Trace, workload: str | None, model: str, hardware: str | None
) -> dict[str, Any]:
    """All that the records of a sweep depend on.

    Args:
      settings: The sweep.
      trace: The recorded trace, or the profile that a workload drew.
      workload: Name of the workload; None for recorded routing.
      model: Name of the model.
      hardware: Name of the profile; None for counts alone.
    """
    return to_plain(
        {
            "version": moejax.__version__,
            "settings": asdict(settings),
            "model": model,
            "hardware": hardware,
            "trace": {"workload": workload, "source": trace.source, "sha256": trace.sha256},
        }
    )


def digest_of(description: dict[str, Any]) -> str:
    """A fingerprint by which processes and files know that they belong together."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_sweep(folder: Path, description: dict[str, Any], *, resumes: bool) -> None:
    """Makes the folder, or checks that it holds this very sweep.

    Raises:
      BadFileError: What should be its settings is no JSON.
      UsageError: It holds another sweep, or shards that nobody asked to go on with, or cannot be
        written.
    """
    path = folder / _SETTINGS
    if path.exists():
        if read_json(path) != description:
            raise UsageError(
                f"{folder} holds another sweep",
                "Give its own settings to go on with it, or another --out.",
            )
        if not resumes and any((folder / _SHARDS).glob("*.json")):
            raise UsageError(
                f"{folder} holds finished shards of this sweep",
                "Go on with --resume, or give another --out.",
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else", "Give another --out.")
    write_json(path, description)


def finished(folder: Path, shards: Sequence[Shard], digest: str) -> set[int]:
    """Numbers of the shards whose files are whole and of this sweep."""
    return {shard.number for shard in shards if _read(folder, shard, digest) is not None}


def num_finished(folder: Path) -> int:
    """How many shards have a file, by any process."""
    return sum(1 for _ in (folder / _SHARDS).glob("*.json"))


def write_shard(folder: Path, shard: Shard, digest: str, records: list[dict[str, Any]]) -> None:
    """Stores a finished shard: the file is there whole, or not at all.

    Raises:
      UsageError: The folder cannot be written.
    """
    content = {"digest": digest, "shard": shard._asdict(), "records": records}
    write_json(folder / _SHARDS / shard.file_name, content)


def gather(
    folder: Path, shards: Sequence[Shard], description: dict[str, Any]
) -> list[dict[str, Any]]:
    """Joins all shards into results.json and returns their records.

    Raises:
      BadFileError: A shard is missing or damaged.
    """
    digest = digest_of(description)
    records = []
    for shard in shards:
        found = _read(folder, shard, digest)
        if found is None:
            raise BadFileError(
                f"{folder / _SHARDS / shard.file_name} is missing or damaged",
                "Run again with --resume.",
            )
        records += found
    environment = to_plain(capture_environment(description["settings"]["seed"]))
    results = {"schema": SWEEP_SCHEMA, "environment": environment, **description}
    write_json(folder / _RESULTS, results | {"records": records})
    return records


def _read(folder: Path, shard: Shard, digest: str) -> list[dict[str, Any]] | None:
    """Records of a shard; None where its file is missing, damaged or of another sweep."""
    try:
        content = read_json(folder / _SHARDS / shard.file_name)
    except BadFileError:
        return None
    is_whole = isinstance(content, dict) and content.get("digest") == digest
    return content.get("records") if is_whole else None
