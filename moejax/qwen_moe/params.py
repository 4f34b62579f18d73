"""Weights: which tensor of a checkpoint is which part of which parameter, both ways.

A parameter's path is its key in the checkpoint without `model.`; only routed experts differ. The
hub stores three matrices an expert, transformers since version 5 stacks those of a layer into the
same two tensors as the model here does:

    hub    model.layers.0.mlp.experts.7.{gate,up,down}_proj.weight
    fused  model.layers.0.mlp.experts.{gate_up,down}_proj
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Shaped

from moejax.errors import BadFileError, UsageError
from moejax.tensors import TensorShape

from ._checkpoint import CONFIG_FILE, Checkpoint, list_faults, open_checkpoint, read_tensor
from ._checkpoint_write import write_checkpoint
from ._config import DTYPES, QwenMoeConfig, read_config, write_config
from .modeling import QwenMoe, RoutedExperts, abstract

LAYOUTS = ("hub", "fused")
"""How routed experts may lie in a checkpoint."""

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# Rotary frequencies were saved by old versions of transformers; they follow from the config.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HUB_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\..*")
_FUSED_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")
# JAX takes over an array of the host without a copy if it is aligned so.
_ALIGNMENT_BYTES = 64
_HINT = "Compare the folder with the files that the model was published with."

ParameterPath = tuple[Any, ...]


class Piece(NamedTuple):
    """The part of a parameter that one tensor of a checkpoint holds.

    Attributes:
      parameter: Path of the parameter in the model.
      index: Where the tensor lies in it; empty for the whole.
      shape: Shape of the tensor.
    """

    parameter: ParameterPath
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def weight_map(model: QwenMoe, layout: str) -> dict[str, Piece]:
    """What each tensor of a checkpoint is in the model; `abstract` models will do.

    Args:
      model: Gives the parameters and their shapes.
      layout: One of `LAYOUTS`.

    Returns:
      Pieces by key of the checkpoint, those of one parameter one after another.

    Raises:
      UsageError: The layout is unknown.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}", f"Known: {', '.join(LAYOUTS)}.")
    return {
        key: piece
        for path, variable in _variables(model).items()
        for key, piece in _pieces(path, variable.get_value().shape, layout)
    }


def check(path: str | Path | Checkpoint) -> Checkpoint:
    """Checks that a checkpoint holds the weights that its configuration describes.

    Headers, sizes, names and shapes are checked; no weight is read.

    Args:
      path: A folder or a name, see `find_checkpoint`, or an opened checkpoint.

    Returns:
      The checkpoint.

    Raises:
      UsageError: There is no such folder, or it holds weights in another format only.
      BadFileError: The checkpoint is corrupt, incomplete, of another architecture, or not of the
        shapes that its configuration gives.
    """
    checkpoint, config, layout = _open(path)
    _check_tensors(checkpoint, weight_map(abstract(config, config.dtype), layout), config)
    return checkpoint


def chosen_dtype(
    checkpoint: Checkpoint, config: QwenMoeConfig, dtype: DTypeLike | None
) -> np.dtype:
    """The type that `load` gives weights if it is asked for `dtype`, which may be None."""
    if dtype is not None:
        return np.dtype(jnp.dtype(_checked_dtype(dtype)))
    stored = {info.dtype for key, info in checkpoint.tensors.items() if not _IGNORED.fullmatch(key)}
    return stored.pop() if len(stored) == 1 else np.dtype(jnp.dtype(config.dtype))


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    routed_experts: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> QwenMoe:
    """Loads a model from a checkpoint folder, holding nothing in memory twice.

    Each parameter is read into the array it stays in. On the CPU JAX takes that array over as it
    is; for another device one parameter at a time waits in host memory. Every tensor must be used
    and every parameter filled; `lm_head.weight` of a model with tied embeddings may be there if
    it is the embedding.

    Args:
      path: A folder or a name, see `find_checkpoint`, or an opened checkpoint.
      dtype: bfloat16, float16 or float32; None keeps the type the weights are stored in, or
        where they are of several, the type that `config.json` states.
      routed_experts: Whether the routed experts are read; else they are arrays of no experts,
        for `read_layer_experts` to be asked for the real ones.
      on_progress: Told the bytes read and the bytes to read after every tensor.

    Returns:
      The model, on JAX's default device.

    Raises:
      UsageError: The folder or the type is not one, or a weight does not fit the type.
      BadFileError: The checkpoint is corrupt, incomplete, of another architecture, not of the
        shapes that its configuration gives, or holds numbers that are not finite.
    """
    checkpoint, config, layout = _open(path)
    model = abstract(config, chosen_dtype(checkpoint, config, dtype))
    pieces = weight_map(model, layout)
    _check_tensors(checkpoint, pieces, config)
    graph, state = nnx.split(model)
    variables = nnx.to_flat_state(state)
    is_empty = {
        path: not routed_experts and isinstance(variable, RoutedExperts)
        for path, variable in variables
    }
    keys_of: dict[ParameterPath, list[str]] = {path: [] for path in is_empty}
    for key, piece in pieces.items():
        if not is_empty[piece.parameter]:
            keys_of[piece.parameter].append(key)
    report = _Progress(checkpoint, itertools.chain(*keys_of.values()), on_progress)
    filled = []
    for parameter, variable in variables:
        wanted = variable.get_value()
        shape = (0, *wanted.shape[1:]) if is_empty[parameter] else wanted.shape
        array = _aligned(shape, np.dtype(wanted.dtype))
        for key in keys_of[parameter]:
            read_tensor(key, checkpoint.tensors[key], array[pieces[key].index])
            report(key)
        if _key_of(parameter) == _EMBEDDING:
            _check_tied(checkpoint, config, array)
        # Waiting keeps copies to a device from piling up in host memory.
        filled.append((parameter, variable.replace(jax.device_put(array).block_until_ready())))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def read_layer_experts(
    checkpoint: Checkpoint, config: QwenMoeConfig, layer: int, dtype: DTypeLike | None = None
) -> tuple[Shaped[np.ndarray, "experts 2*ffn hidden"], Shaped[np.ndarray, "experts hidden ffn"]]:
    """Reads the routed experts of one layer into host memory.

    They come in `dtype`, or where that is None in the type they are stored in.

    Raises:
      UsageError: The layer has no routed experts, or a weight does not fit the type.
      BadFileError: A tensor is missing, has another shape or holds numbers that are not finite.
    """
    if layer not in config.moe_layers:
        raise UsageError(
            f"layer {layer} has no routed experts", f"Those of {config.moe_layers} do."
        )
    layout = _find_layout(checkpoint)
    _check_counts(checkpoint, config, layout)
    count, hidden, ffn = config.num_experts, config.hidden_size, config.moe_intermediate_size
    arrays = []
    for name, shape in (
        ("gate_up_proj", (count, 2 * ffn, hidden)),
        ("down_proj", (count, hidden, ffn)),
    ):
        pieces = dict(_pieces(("layers", layer, "mlp", "experts", name), shape, layout))
        _refuse(checkpoint, _missing_or_misshapen(checkpoint, pieces))
        stored = np.result_type(*{checkpoint.tensors[key].dtype for key in pieces})
        array = _aligned(shape, stored if dtype is None else np.dtype(jnp.dtype(dtype)))
        for key, piece in pieces.items():
            read_tensor(key, checkpoint.tensors[key], array[piece.index])
        arrays.append(array)
    return arrays[0], arrays[1]


def save(
    model: QwenMoe,
    path: str | Path,
    *,
    layout: str = "hub",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint folder that `load` and transformers both read.

    Tensors are written one at a time, straight from the parameters. An older checkpoint in the
    folder is replaced; other files beside it, such as a tokenizer, stay.

    Args:
      model: Its parameters are bfloat16, float16 or float32.
      path: The folder, made if it is not there.
      layout: One of `LAYOUTS`; `hub` is what every version of transformers reads.
      max_shard_bytes: Size above which weights are spread over several files with an index.

    Raises:
      UsageError: The folder holds something else or cannot be written, or a setting is not one.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"a file of at most {max_shard_bytes} bytes holds nothing")
    pieces = weight_map(model, layout)
    variables = _variables(model)
    dtypes = {path: np.dtype(variable.get_value().dtype) for path, variable in variables.items()}
    names = {_checked_dtype(dtype) for dtype in dtypes.values()}
    name = names.pop() if len(names) == 1 else model.config.dtype

    @lru_cache(maxsize=1)
    def on_host(parameter: ParameterPath) -> np.ndarray:
        return np.asarray(variables[parameter].get_value())

    write_checkpoint(
        Path(path),
        write_config(replace(model.config, dtype=name)),
        {key: TensorShape(dtypes[piece.parameter], piece.shape) for key, piece in pieces.items()},
        lambda key: on_host(pieces[key].parameter)[pieces[key].index],
        max_shard_bytes=max_shard_bytes,
    )


class _Progress:
    """Adds up what was read and tells it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        keys: Iterable[str],
        tell: Callable[[int, int], None] | None,
    ):
        self.sizes = {key: checkpoint.tensors[key].num_bytes for key in keys}
        self.total_bytes = sum(self.sizes.values())
        self.done_bytes = 0
        self.tell = tell

    def __call__(self, key: str) -> None:
        self.done_bytes += self.sizes[key]
        if self.tell is not None:
            self.tell(self.done_bytes, self.total_bytes)


def _open(path: str | Path | Checkpoint) -> tuple[Checkpoint, QwenMoeConfig, str]:
    """A checkpoint, its configuration and its layout, which agree in the number of tensors."""
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    config = read_config(checkpoint.config, str(checkpoint.path / CONFIG_FILE))
    layout = _find_layout(checkpoint)
    _check_counts(checkpoint, config, layout)
    return checkpoint, config, layout


def _variables(model: QwenMoe) -> dict[ParameterPath, nnx.Variable]:
    return dict(nnx.to_flat_state(nnx.split(model)[1]))


def _pieces(
    parameter: ParameterPath, shape: tuple[int, ...], layout: str
) -> Iterator[tuple[str, Piece]]:
    """The tensors that make up one parameter."""
    key = _key_of(parameter)
    if layout == "fused" or not _FUSED_EXPERTS.fullmatch(key):
        yield key, Piece(parameter, (), shape)
        return
    folder, name = key.rsplit(".", 1)
    count, rows, columns = shape
    for expert in range(count):
        if name == "down_proj":
            yield f"{folder}.{expert}.down_proj.weight", Piece(parameter, (expert,), shape[1:])
            continue
        for half, part in enumerate(("gate_proj", "up_proj")):
            ffn = rows // 2
            index = (expert, slice(half * ffn, (half + 1) * ffn))
            yield f"{folder}.{expert}.{part}.weight", Piece(parameter, index, (ffn, columns))


def _key_of(parameter: ParameterPath) -> str:
    key = ".".join(map(str, parameter))
    return key if key == _HEAD else f"model.{key}"


def _find_layout(checkpoint: Checkpoint) -> str:
    hub = next(filter(_HUB_EXPERT.fullmatch, checkpoint.tensors), None)
    fused = next(filter(_FUSED_EXPERTS.fullmatch, checkpoint.tensors), None)
    if hub and fused:
        raise BadFileError(
            f"{checkpoint.path} mixes two layouts of experts: {hub} and {fused}",
            "Save the model anew in one of them.",
        )
    return "fused" if fused else "hub"


def _check_counts(checkpoint: Checkpoint, config: QwenMoeConfig, layout: str) -> None:
    """Keeps a configuration of a million layers from being spelled out."""
    limit = len(checkpoint.tensors)
    is_within = config.num_hidden_layers <= limit and (
        layout == "fused" or len(config.moe_layers) * config.num_experts <= limit
    )
    if not is_within:
        raise BadFileError(
            f"{checkpoint.path} holds {limit} tensors, too few for the {config.num_hidden_layers} "
            f"layers and {config.num_experts} experts of its {CONFIG_FILE}",
            _HINT,
        )


def _checked_dtype(dtype: DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UsageError(
            f"weights of type {name} are not supported", f"Known: {', '.join(DTYPES)}."
        )
    return name


def _check_tensors(
    checkpoint: Checkpoint, pieces: Mapping[str, Piece], config: QwenMoeConfig
) -> None:
    """Every tensor used, every parameter filled, every shape right; or all faults in one error."""
    ignored = {_HEAD} if config.tie_word_embeddings else set()
    faults = _missing_or_misshapen(checkpoint, pieces)
    faults += [
        f"{key:.80} belongs to no parameter"
        for key in checkpoint.tensors
        if key not in pieces and key not in ignored and not _IGNORED.fullmatch(key)
    ]
    _refuse(checkpoint, faults)


def _missing_or_misshapen(checkpoint: Checkpoint, pieces: Mapping[str, Piece]) -> list[str]:
    faults = [f"{key} is missing" for key in pieces if key not in checkpoint.tensors]
    for key, piece in pieces.items():
        info = checkpoint.tensors.get(key)
        if info is not None and info.shape != piece.shape:
            faults.append(f"{key} has shape {list(info.shape)}, not {list(piece.shape)}")
    return faults


def _refuse(checkpoint: Checkpoint, faults: list[str]) -> None:
    if faults:
        raise BadFileError(
            f"{checkpoint.path} holds other weights than its {CONFIG_FILE} describes: "
            f"{list_faults(faults)}",
            _HINT,
        )


def _check_tied(checkpoint: Checkpoint, config: QwenMoeConfig, embedding: np.ndarray) -> None:
    """A head beside a tied embedding must be the embedding; transformers would not tie them."""
    info = checkpoint.tensors.get(_HEAD)
    if info is None or not config.tie_word_embeddings:
        return
    head = np.empty(info.shape, embedding.dtype)
    read_tensor(_HEAD, info, head)
    if not np.array_equal(head, embedding):
        raise BadFileError(
            f"{checkpoint.path}: tie_word_embeddings is true, but {_HEAD} is not {_EMBEDDING}",
            f"Set tie_word_embeddings to false in {CONFIG_FILE}, or remove the tensor.",
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    room = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT_BYTES
    return room[begin : begin + num_bytes].view(dtype).reshape(shape)
