"""A tiny random checkpoint with a tokenizer of bytes, so that commands take a second."""

from pathlib import Path

from moejax.qwen_moe import QwenMoeConfig
from moejax.qwen_moe.params import save

from ..engine._tiny import random_model
from ..qwen_moe._byte_tokenizer import write_byte_tokenizer

CONFIG = QwenMoeConfig(
    vocab_size=256,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=12,
    norm_topk_prob=False,
    max_position_embeddings=32,
    dtype="float32",
    eos_token_ids=(0,),
)


def write_checkpoint(folder: Path, **settings) -> Path:
    """Writes the checkpoint; `settings` go to its `tokenizer_config.json`."""
    save(random_model(CONFIG), folder)
    return write_byte_tokenizer(folder, **settings)
