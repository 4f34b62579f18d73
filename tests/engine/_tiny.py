"""Tiny random models whose texts vary."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from moejax.qwen_moe import QwenMoe, QwenMoeConfig, Routing, abstract

CONFIG = QwenMoeConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=12,
    norm_topk_prob=False,
    # Layers 0 and 2 have experts.
    mlp_only_layers=(1,),
    max_position_embeddings=64,
)

# Where only the number of compiles or of tokens matters.
ONE_LAYER = replace(CONFIG, num_hidden_layers=1, mlp_only_layers=())


def random_model(
    config: QwenMoeConfig = CONFIG, seed: int = 2, dtype: DTypeLike = jnp.float32
) -> QwenMoe:
    """Norms and biases are random too; weights so wide that no choice is a close call."""
    graph, shapes = nnx.split(abstract(config, dtype))
    generator = np.random.default_rng(seed)

    def draw(path: tuple, param: jax.ShapeDtypeStruct) -> jax.Array:
        mean = float("norm" in jax.tree_util.keystr(path))
        return jnp.asarray(generator.normal(mean, 0.5, param.shape), param.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, shapes))


def plain_forward(model: QwenMoe, tokens: jax.Array) -> tuple[jax.Array, tuple[Routing, ...]]:
    """Logits and routing of whole texts, without a cache."""
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1))
    logits, _, routings = jax.jit(lambda *x: model(*x))(tokens, positions)
    return logits, routings
