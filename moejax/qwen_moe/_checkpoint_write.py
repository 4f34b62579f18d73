"""Checkpoint folders as they are written: streamed, and complete or not a checkpoint at all."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import BadFileError, UsageError
from moejax.tensors import TensorShape, write_tensors
from moejax.units import format_bytes

from ._checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json
from ._config import MODEL_TYPE

# What belongs to a checkpoint and is not written here.
_COMPANION_FILE = re.compile(r"tokenizer.*\.json|.*\.(md|jinja)")
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, TensorShape],
    make: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes a checkpoint folder with one tensor in memory at a time.

    An older checkpoint in the folder is replaced once the new one is complete. `config.json`
    goes first and comes last: without it a half-written folder is never taken for a checkpoint.

    Args:
      folder: Made if it is not there.
      config: Fields of its `config.json`.
      shapes: Type and shape of each tensor by name.
      make: Gives the tensor of a name; called once for each, neighbours of `shapes` mostly
        one after another.
      max_shard_bytes: Tensors are spread over files of at most this size, where each fits.

    Raises:
      UsageError: The folder holds something else, or cannot be written.
    """
    shards = _divide(shapes, max_shard_bytes)
    try:
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            staging = Path(name)
            for file, names in shards.items():
                shard = {name: shapes[name] for name in names}
                write_tensors(staging / file, shard, make, {"format": "pt"})
            if len(shards) > 1:
                _write_json(staging / INDEX_FILE, _index(shards, shapes))
            _write_json(staging / CONFIG_FILE, config)
            _publish(staging, folder)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror or error}",
            "Give a folder on a disk with room for "
            f"{format_bytes(sum(shape.num_bytes for shape in shapes.values()))}.",
        ) from error


def _refuse_foreign(folder: Path) -> None:
    """Only nothing, or an older checkpoint of the same kind, may be overwritten."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "Give a new or empty folder.")
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    known = (_WEIGHT_FILE, _COMPANION_FILE)
    others = [name for name in files if not any(kind.fullmatch(name) for kind in known)]
    if others and _model_type(folder / CONFIG_FILE) != MODEL_TYPE:
        raise UsageError(
            f"{folder} holds something else, such as {others[0]}", "Give a new or empty folder."
        )


def _model_type(path: Path) -> Any:
    try:
        return read_json(path).get("model_type")
    except BadFileError:
        return None


def _divide(shapes: Mapping[str, TensorShape], max_shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in order; a tensor above the limit gets a file of its own."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, shape in shapes.items():
        if shards[-1] and num_bytes + shape.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += shape.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _index(shards: Mapping[str, list[str]], shapes: Mapping[str, TensorShape]) -> dict[str, Any]:
    total = sum(shape.num_bytes for shape in shapes.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _publish(staging: Path, folder: Path) -> None:
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if _WEIGHT_FILE.fullmatch(path.name):
            path.unlink()
    # The configuration is last: with it the folder is a checkpoint.
    for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        os.replace(path, folder / path.name)
