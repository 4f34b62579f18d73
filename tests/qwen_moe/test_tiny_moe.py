"""The model that comes with moejax: its folder is sound and says what it always said."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.cards import load_model, models_dir, read_card
from moejax.engine import Engine
from moejax.qwen_moe import QwenMoe, read_config
from moejax.qwen_moe.params import load
from moejax.qwen_moe.tokenizer import open_tokenizer

FOLDER = models_dir() / "tiny-moe"
MOST_BYTES = 12_000_000
PROMPT = "The "
# Written by the model itself, float32 on a CPU. Nowhere was the second choice within 0.01 nats.
CONTINUATION = "second section of the contents of the contents o"


@pytest.fixture(scope="module")
def model() -> QwenMoe:
    return load("tiny-moe", dtype=jnp.float32)


def test_the_folder_is_small_and_whole():
    names = {"config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MOST_BYTES


def test_the_config_is_that_of_the_card(model):
    card = models_dir() / "tiny-moe.toml"
    # What the design leaves to training.
    trained = {"max_position_embeddings": 512, "initializer_range": 0.05, "eos_token_id": 0}
    assert read_config({**read_card(card)["config"], **trained}, str(card)) == model.config


def test_weights_are_as_many_as_the_card_counts(model):
    weights = [np.asarray(weight) for weight in nnx.to_flat_state(nnx.state(model)).leaves]
    spec = load_model("tiny-moe")
    assert sum(weight.size for weight in weights) == spec.total_params
    assert all(np.isfinite(weight).all() for weight in weights)


def test_tokens_are_bytes():
    tokenizer = open_tokenizer(FOLDER)
    text = "Grüße, 世界\n\t\x7f"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_ids == (0,)


def test_it_goes_on_as_it_always_did(model):
    generation = Engine(model).generate(
        [list(PROMPT.encode())], max_new_tokens=len(CONTINUATION), stop_token_ids=(0,)
    )
    (token_ids,) = generation.finish().token_ids
    assert bytes(token_ids).decode() == CONTINUATION
