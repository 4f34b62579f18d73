"""A tiny model of random weights, its folder, and how to damage one."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.qwen_moe import QwenMoe, QwenMoeConfig, abstract, params

# Grouped heads, a layer without experts, and no two widths alike.
CONFIG = QwenMoeConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=10,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    shared_expert_intermediate_size=14,
    norm_topk_prob=False,
    mlp_only_layers=(1,),
)

Weights = dict[tuple, np.ndarray]


@cache
def make_model(config: QwenMoeConfig = CONFIG, dtype=jnp.bfloat16) -> QwenMoe:
    """Fills a model with numbers of its own for every parameter."""
    generator = np.random.default_rng(0)
    graph, state = nnx.split(abstract(config, dtype))
    filled = [
        (path, variable.replace(jnp.asarray(generator.standard_normal(variable.shape), dtype)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def weights_of(model: QwenMoe) -> Weights:
    """Every parameter by its path."""
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return {path: np.asarray(variable.get_value()) for path, variable in flat}


def save_tiny(folder: Path, *, layout: str = "hub", max_shard_bytes: int = 10**9) -> Weights:
    """Writes the tiny model and gives its weights."""
    model = make_model()
    params.save(model, folder, layout=layout, max_shard_bytes=max_shard_bytes)
    return weights_of(model)


def is_same(first: Weights, second: Weights) -> bool:
    """Whether types and bits of all parameters agree."""
    return first.keys() == second.keys() and all(
        array.dtype == second[path].dtype and array.tobytes() == second[path].tobytes()
        for path, array in first.items()
    )


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:begin]), content[begin:]


def join_file(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Writes a safetensors file from whatever is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file in place."""
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes the tensors of a file and lays them out anew, soundly."""
    header, data = split_file(path)
    header.pop("__metadata__", None)
    kinds = {"BF16": jnp.dtype("bfloat16"), "F16": "<f2", "F32": "<f4"}
    names = {np.dtype(kind): name for name, kind in kinds.items()}
    tensors = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        .reshape(entry["shape"])
        .copy()
        for name, entry in header.items()
    }
    edit(tensors)
    entries, content = {}, b""
    for name, array in tensors.items():
        entries[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(content), len(content) + array.nbytes],
        }
        content += array.tobytes()
    join_file(path, entries, content)
