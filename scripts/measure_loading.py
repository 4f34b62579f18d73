"""Measures the memory and the time that loading a checkpoint takes.

    python scripts/measure_loading.py [--size 4GB] [--layout hub|fused] [--dtype float32]
        [--out reports/loading/results.json]

writes random weights of Qwen1.5-MoE's shapes into a temporary folder, loads them in a fresh
process and prints one line of JSON per layout. The weights lie in the page cache when they are
loaded. The peak is that of the whole process, as the kernel counts it; the baseline is its peak
after imports and the first use of the device, right before loading.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moejax.errors import MoejaxError, UsageError
from moejax.qwen_moe import QwenMoeConfig, abstract, params, write_config
from moejax.qwen_moe.params import LAYOUTS, weight_map
from moejax.results import capture_environment, write_json
from moejax.tensors import TensorShape, write_tensors
from moejax.units import format_bytes, parse_bytes

ONE_LAYER = QwenMoeConfig(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    norm_topk_prob=False,
)
SCHEMA, SEED = "moejax.loading/1", 0
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def main() -> None:
    """Writes, loads and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="4GB")
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--dtype", help="type to cast to while loading")
    parser.add_argument("--out", type=Path, help="file for all lines and the environment")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measure(options.load, options.dtype)))
        return
    try:
        config = config_of(parse_bytes(options.size))
    except MoejaxError as error:
        sys.exit(f"error: {error.cause}\n\nhint: {error.hint}")
    rows = []
    for layout in options.layout or LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            size_bytes = write(Path(folder), config, layout)
            command = [sys.executable, __file__, "--load", folder]
            command += ["--dtype", options.dtype] if options.dtype else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        row = {
            "layout": layout,
            "checkpoint_bytes": size_bytes,
            **found,
            "peak_ratio": found["peak_bytes"] / size_bytes,
            "added_ratio": (found["peak_bytes"] - found["baseline_bytes"]) / size_bytes,
            "bytes_per_s": size_bytes / found["load_s"],
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    if options.out is not None:
        environment = capture_environment(SEED)
        write_json(options.out, {"schema": SCHEMA, "environment": environment, "rows": rows})


def config_of(size_bytes: int) -> QwenMoeConfig:
    """As many layers as nine tenths of the size hold; the vocabulary fills the rest."""
    layer_bytes = _num_bytes(replace(ONE_LAYER, num_hidden_layers=2)) - _num_bytes(ONE_LAYER)
    num_layers = int(0.9 * size_bytes / layer_bytes)
    if not num_layers:
        raise UsageError(
            f"{format_bytes(size_bytes)} hold no layer", f"One has {format_bytes(layer_bytes)}."
        )
    rest_bytes = size_bytes - num_layers * layer_bytes
    vocab_size = rest_bytes // (2 * ONE_LAYER.hidden_size * BFLOAT16.itemsize)
    return replace(ONE_LAYER, num_hidden_layers=num_layers, vocab_size=vocab_size)


def write(folder: Path, config: QwenMoeConfig, layout: str) -> int:
    """Writes a checkpoint of random weights, one tensor at a time; gives its bytes."""
    generator = np.random.default_rng(0)
    shapes = _shapes(config, layout)

    def draw(key: str) -> np.ndarray:
        bits = np.frombuffer(generator.bytes(shapes[key].num_bytes), np.uint16)
        # Without its highest bit the exponent makes no infinity.
        return (bits & 0xBFFF).view(BFLOAT16).reshape(shapes[key].shape)

    write_tensors(folder / "model.safetensors", shapes, draw, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    return sum(shape.num_bytes for shape in shapes.values())


def measure(folder: str, dtype: str | None) -> dict[str, float]:
    """Loads, in this process."""
    jnp.zeros(1).block_until_ready()
    baseline_bytes = peak_bytes()
    begin = time.perf_counter()
    params.load(folder, dtype=dtype)
    load_s = time.perf_counter() - begin
    return {"baseline_bytes": baseline_bytes, "peak_bytes": peak_bytes(), "load_s": load_s}


def peak_bytes() -> int:
    """Most memory this process ever had resident; `ru_maxrss` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _num_bytes(config: QwenMoeConfig) -> int:
    return sum(shape.num_bytes for shape in _shapes(config, "fused").values())


def _shapes(config: QwenMoeConfig, layout: str) -> dict[str, TensorShape]:
    pieces = weight_map(abstract(config, jnp.bfloat16), layout)
    return {key: TensorShape(BFLOAT16, piece.shape) for key, piece in pieces.items()}


if __name__ == "__main__":
    main()
