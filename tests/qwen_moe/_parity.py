"""The one check of the port against the reference: how far apart, and whether that is too far."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from moejax.qwen_moe import QwenMoe, empty_cache

from ._reference_models import GOLDEN

LIMITS = {
    "logits": 1e-5,
    "hidden_states": 1e-5,
    "router_logits": 1e-4,
    "selected_experts": 0.0,
    "greedy_token_ids": 0.0,
    "greedy_logits": 1e-5,
}
"""Largest absolute difference that still counts as the same model, by array of a golden file."""

Arrays = dict[str, np.ndarray]


def read_golden(name: str) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a golden file and what it says about its making."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, framework="numpy") as file:
        made = json.loads(file.metadata()["made_with"])
    return load_file(path), made


def assert_parity(found: Arrays, golden: Arrays) -> None:
    """Fails where any array is further from the golden one than its limit."""
    for name, deviation in deviations(found, golden).items():
        assert deviation <= LIMITS[name], f"{name}: off by {deviation:.3g}, not {LIMITS[name]:g}"


def deviations(found: Arrays, golden: Arrays) -> dict[str, float]:
    """Largest absolute difference of every array found; infinite where shapes differ or NaN."""
    return {name: _deviation(value, golden[name]) for name, value in found.items()}


def read_prompt(model: QwenMoe, token_ids: np.ndarray, experts: str = "gather") -> Arrays:
    """What the model computes for whole sequences, layer by layer and as one."""
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
    with jax.default_matmul_precision("highest"):
        logits, _, routings = model(jnp.asarray(token_ids), positions, experts=experts)
        x, layers = model.embed_tokens(jnp.asarray(token_ids)), []
        for layer in model.layers:
            x, _ = layer.attend(x, positions)
            x, _ = layer.feed_forward(x, implementation=experts)
            layers.append(x)
    return {
        "logits": np.asarray(logits),
        "hidden_states": np.stack(layers),
        "router_logits": np.stack([routing.router_logits for routing in routings]),
        "selected_experts": np.stack([routing.selected_experts for routing in routings]),
    }


def generate(model: QwenMoe, token_ids: np.ndarray, num_new_tokens: int) -> Arrays:
    """Greedy continuations with a cache: the prompt at once, then token by token, compiled."""
    batch_size, num_tokens = token_ids.shape
    cache = empty_cache(model.config, batch_size, num_tokens + num_new_tokens, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(num_tokens), token_ids.shape)
    graph, state = nnx.split(model)
    step = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
    with jax.default_matmul_precision("highest"):
        logits, cache, _ = model(jnp.asarray(token_ids), positions, cache, experts="gather")
        steps = [logits[:, -1]]
        for position in range(num_tokens, num_tokens + num_new_tokens - 1):
            token = jnp.argmax(steps[-1], axis=-1)[:, None]
            logits, cache, _ = step(state, token, jnp.full(token.shape, position), cache)
            steps.append(logits[:, -1])
    greedy_logits = np.stack(steps, axis=1)
    return {"greedy_token_ids": greedy_logits.argmax(-1), "greedy_logits": greedy_logits}


def load_script(name: str) -> ModuleType:
    """One of the repository's scripts as a module; they are imported by nothing else."""
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _deviation(found: np.ndarray, golden: np.ndarray) -> float:
    if found.shape != golden.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - golden.astype(np.float64)).max())
