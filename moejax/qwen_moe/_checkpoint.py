"""Checkpoint folders: found, checked against themselves, and read tensor by tensor.

A folder holds `config.json` and either `model.safetensors` or several such files with an index.
Nothing here knows what the tensors are for; that is `params`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.cards import MODELS, load_model, models_dir
from moejax.errors import BadFileError, UsageError
from moejax.tensors import FORMAT_HEADER_BYTES, FileKind, TensorInfo, parse_table, read_header
from moejax.trace import TRACES

from ._config import ARCHITECTURE, MODEL_TYPE

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# An index of a million tensors stays below this.
_MAX_JSON_BYTES = 10**8
# Fits a core's own cache: there the check of a block costs a quarter of what reading it does,
# three times less than from memory.
_BLOCK_BYTES = 2**18
_MAX_LISTED_FAULTS = 8
_HINT = "Download it again, for example with: hf download ORGANISATION/NAME"
_CONVERT = (
    "Convert it with transformers: "
    "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(OUT), and give OUT."
)
_SHIPPED = sorted(path.parent.name for path in models_dir().glob(f"*/{CONFIG_FILE}"))
_NAME_HINT = (
    f"Give a folder with config.json and .safetensors files, a name ({', '.join(_SHIPPED)}), "
    "or the ORGANISATION/NAME of a model you downloaded."
)
_KIND = FileKind(
    name="checkpoint",
    dtypes=("BF16", "F16", "F32"),
    max_header_bytes=FORMAT_HEADER_BYTES,
    hint=_HINT,
    zip_hint=f"PyTorch's own files are such archives. {_CONVERT}",
)
_OTHER_WEIGHTS = {
    ".bin": _CONVERT,
    ".pt": _CONVERT,
    ".pth": _CONVERT,
    ".gguf": "moejax reads no quantised weights: download the model's .safetensors files.",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files agree with each other; no tensor has been read yet.

    Attributes:
      path: The folder.
      config: Fields of its `config.json`.
      tensors: Where each tensor lies.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The folder that a user's name for a model means.

    Args:
      name_or_path: A folder, the name of a model that comes with moejax or has a card, or the
        `Organisation/Name` of one that was downloaded from the hub before. Nothing is downloaded.

    Raises:
      UsageError: There is no such folder on this machine.
    """
    text, path = str(name_or_path), Path(name_or_path)
    if not text.strip():
        raise UsageError("the name of the model is empty", _NAME_HINT)
    try:
        if path.is_dir():
            return path
        is_there = path.exists()
    except (OSError, ValueError):
        is_there = False
    if is_there:
        raise UsageError(f"{text} is not a folder", "Give the folder that holds config.json.")
    if text in _SHIPPED:
        return models_dir() / text
    hub_id = load_model(text).hub_id if text in MODELS else text
    if _HUB_ID.fullmatch(hub_id):
        return _find_downloaded(hub_id)
    if text in MODELS:
        recorded = f"Its recorded routing comes with moejax: --trace {text}. " * (text in TRACES)
        raise UsageError(
            f"{text} is a card without weights: none come with moejax", f"{recorded}{_NAME_HINT}"
        )
    raise UsageError(f"{text!r} is neither a checkpoint folder nor the name of one", _NAME_HINT)


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Opens a checkpoint and checks every header and the index, before any weight is read.

    Args:
      name_or_path: See `find_checkpoint`.

    Raises:
      UsageError: There is no such folder, or it holds weights in another format only.
      BadFileError: A file is missing, corrupt or contradicts another one, or the folder is of
        another architecture.
    """
    folder = find_checkpoint(name_or_path)
    config = read_json(folder / CONFIG_FILE)
    _check_architecture(folder, config)
    is_single, is_sharded = ((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    if is_single and is_sharded:
        raise BadFileError(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}", "Remove the one that is stale."
        )
    if is_sharded:
        return Checkpoint(folder, config, _read_shards(folder))
    if not is_single:
        raise _without_weights(folder)
    return Checkpoint(folder, config, read_header(folder / SINGLE_FILE, _KIND)[0])


def read_tensor(name: str, info: TensorInfo, destination: np.ndarray) -> None:
    """Reads one tensor into an array, cast to the array's type, block by block.

    Nothing but one block is held beside `destination`. The file is read, not mapped: touched pages
    of a mapping would count as memory of this process until they are given back.

    Args:
      name: What error messages call the tensor.
      info: Where it lies.
      destination: A C-contiguous array of its shape, overwritten.

    Raises:
      BadFileError: The file changed since its header was read, or a value is not finite.
      UsageError: A value does not fit the type it is cast to.
    """
    values = destination.reshape(-1)
    num_block = _BLOCK_BYTES // max(info.dtype.itemsize, values.itemsize)
    stored = np.empty(min(num_block, values.size), info.dtype)
    is_cast = info.dtype != values.dtype
    try:
        with open(info.path, "rb", buffering=0) as file:
            file.seek(info.offset_bytes)
            for begin in range(0, values.size, num_block):
                part = values[begin : begin + num_block]
                block = stored[: part.size] if is_cast else part
                _read_whole(file.readinto, block, info.path)
                if is_cast:
                    with np.errstate(over="ignore"):
                        part[...] = block
                if not _is_finite(part):
                    raise _not_finite(name, info, block, values.dtype)
    except OSError as error:
        raise _unreadable(info.path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is a table.

    Raises:
      BadFileError: It is missing, unreadable, too large or no such table.
    """
    try:
        # A pipe or a device would block or never end, hence the question before opening.
        if not path.is_file():
            raise BadFileError(f"{path} is missing or not a file", _HINT)
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BadFileError(f"{path} has {path.stat().st_size} bytes: too many", _HINT)
        return parse_table(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is no sound JSON: {error}", _HINT) from error


def list_faults(faults: Sequence[str]) -> str:
    """The first faults, and how many more there are."""
    rest = len(faults) - _MAX_LISTED_FAULTS
    listed = "; ".join(faults[:_MAX_LISTED_FAULTS])
    return f"{listed}; and {rest} more" if rest > 0 else listed


def _find_downloaded(hub_id: str) -> Path:
    download = f"Download it with: hf download {hub_id}"
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{hub_id} is no folder, and huggingface_hub, which knows downloads, is not installed",
            f"Install moejax[hub]. {download}",
        ) from error
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except Exception as error:  # The hub raises dozens of types of several libraries.
        raise UsageError(
            f"{hub_id} is neither a folder nor a model downloaded before", download
        ) from error


def _check_architecture(folder: Path, config: Mapping[str, Any]) -> None:
    said = config.get("architectures") or [ARCHITECTURE]
    if config.get("model_type") != MODEL_TYPE or said != [ARCHITECTURE]:
        found = config.get("model_type") if said == [ARCHITECTURE] else said
        raise BadFileError(
            f"{folder} holds a model of another architecture: {found!r:.80}",
            f"The port runs {ARCHITECTURE} (model_type {MODEL_TYPE}), such as Qwen1.5-MoE-A2.7B.",
        )


def _without_weights(folder: Path) -> UsageError:
    files = sorted(path for path in folder.glob("*") if path.suffix in _OTHER_WEIGHTS)
    if files:
        return UsageError(
            f"{folder} holds weights as {files[0].name}, not as safetensors",
            _OTHER_WEIGHTS[files[0].suffix],
        )
    return UsageError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}", _HINT)


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = _read_index(folder / INDEX_FILE)
    names_of: dict[str, list[str]] = {}
    for name, file in index.items():
        names_of.setdefault(file, []).append(name)
    faults = [f"{file} is missing" for file in sorted(names_of) if not (folder / file).is_file()]
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(names_of):
        if not (folder / file).is_file():
            continue
        found = read_header(folder / file, _KIND)[0]
        faults += [f"{name} is not in {file}" for name in names_of[file] if name not in found]
        for name, info in found.items():
            if index.get(name) != file:
                said = f"the index puts it into {index[name]}" if name in index else "not indexed"
                faults.append(f"{name} is in {file}, {said}")
            tensors[name] = info
    if faults:
        raise BadFileError(f"{folder / INDEX_FILE} and its files: {list_faults(faults)}", _HINT)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; a file must lie in the folder itself."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise BadFileError(f"{path} has no weight_map", _HINT)
    for name, file in index.items():
        is_plain = isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file)
        if not is_plain:
            raise BadFileError(
                f"{path} puts {name!r:.80} into {file!r:.80}, which is no .safetensors file name",
                _HINT,
            )
    return index


def _read_whole(readinto: Callable[[memoryview], int], block: np.ndarray, path: Path) -> None:
    rest = block.view(np.uint8).data
    while rest:
        num_read = readinto(rest)
        if not num_read:
            raise BadFileError(f"{path} was cut off while it was read", _HINT)
        rest = rest[num_read:]


def _unreadable(path: Path, error: OSError) -> BadFileError:
    return BadFileError(f"{path} cannot be read: {error.strerror or error}", _HINT)


def _is_finite(values: np.ndarray) -> bool:
    """As `isfinite(values).all()`, several times faster, and for types numpy does not know."""
    kind = np.dtype(f"u{values.itemsize}")
    # With the sign shifted out, infinity and NaN are the largest numbers.
    infinity = np.array(np.inf, values.dtype).view(kind) << 1
    return bool((values.view(kind) << 1).max() < infinity)


def _not_finite(
    name: str, info: TensorInfo, block: np.ndarray, dtype: np.dtype
) -> BadFileError | UsageError:
    if _is_finite(block):
        largest = float(np.abs(block.astype(np.float32)).max())
        return UsageError(
            f"{name} holds {largest:.3g}, which does not fit {dtype}",
            "Load it as bfloat16 or float32.",
        )
    return BadFileError(f"{info.path}: {name} holds a number that is not finite", _HINT)
