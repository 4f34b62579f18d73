"""A tiny model of widths that are no powers of two, and how kernels run in tests."""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.engine.kernels._parts import Launch
from moejax.qwen_moe import QwenMoe, QwenMoeConfig

from .._tiny import random_model

CONFIG = QwenMoeConfig(
    vocab_size=100,
    hidden_size=96,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=80,
    norm_topk_prob=False,
    max_position_embeddings=64,
)
INTERPRETED = Launch(is_interpreted=True)


def tiny_model(config: QwenMoeConfig = CONFIG, dtype: jnp.dtype = jnp.float32) -> QwenMoe:
    graph, state = nnx.split(random_model(config))
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))


def pad(x: jax.Array, filling: float = 0.0) -> jax.Array:
    """[batch, features] as the kernels take it: [features, 1] or [features, 16]."""
    num_columns = 1 if x.shape[0] == 1 else 16
    return jnp.pad(x.T, ((0, 0), (0, num_columns - x.shape[0])), constant_values=filling)


def error(found: jax.Array, wanted: jax.Array) -> float:
    """Greatest difference relative to the greatest value."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    assert found.shape == wanted.shape
    return float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted)))
