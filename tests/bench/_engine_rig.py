"""A model so small that an engine of it compiles in seconds."""

from dataclasses import replace

from moejax.bench import Rig, random_rig

from ..engine._tiny import CONFIG

NUM_EXPERTS, TOPK, NUM_LAYERS = 6, 2, 2

TINY = replace(
    CONFIG,
    num_hidden_layers=NUM_LAYERS,
    mlp_only_layers=(),
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=TOPK,
    max_position_embeddings=256,
    dtype="float32",
)


def tiny_rig(seed: int = 0) -> Rig:
    """Random weights and plain JAX."""
    return random_rig(TINY, name="tiny", kernels="xla", seed=seed)
