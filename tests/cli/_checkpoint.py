"""A tiny random checkpoint with a tokenizer of bytes, so that commands take a second."""

from dataclasses import replace
from pathlib import Path

from moejax.qwen_moe.params import save

from ..engine import _tiny
from ..engine._tiny import random_model
from ..qwen_moe._byte_tokenizer import write_byte_tokenizer

CONFIG = replace(
    _tiny.CONFIG,
    vocab_size=256,
    num_hidden_layers=2,
    mlp_only_layers=(),
    max_position_embeddings=32,
    dtype="float32",
    eos_token_ids=(0,),
)


def write_checkpoint(folder: Path, **settings) -> Path:
    """Writes the checkpoint; `settings` go to its `tokenizer_config.json`."""
    save(random_model(CONFIG), folder)
    return write_byte_tokenizer(folder, **settings)
