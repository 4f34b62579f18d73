"""The port computes what the reference computes, and the check would notice if it did not.

The reference's numbers are stored, see `scripts/make_parity_golden.py`; no torch is needed.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.qwen_moe import EXPERTS, QwenMoe, empty_cache, params

from ._parity import (
    LIMITS,
    Arrays,
    assert_parity,
    deviations,
    generate,
    read_golden,
    read_prompt,
)
from ._reference_models import (
    CONFIGS,
    NUM_NEW_TOKENS,
    digest,
    make_token_ids,
    make_weights,
    write_checkpoint,
    write_reference_model,
)
from ._wrong_details import WRONG, WRONG_CACHE

Open = Callable[[str, str], QwenMoe]


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Loads one of the six models from a folder in one of the two layouts, once each."""

    @functools.cache
    def open_once(name: str, layout: str = "hub") -> QwenMoe:
        folder = tmp_path_factory.mktemp(f"{name}-{layout}")
        return params.load(write_reference_model(folder, name, layout))

    return open_once


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_files_are_of_these_models(name: str):
    golden, made = read_golden(name)
    assert made["weights_sha256"] == digest(make_weights(name))
    np.testing.assert_array_equal(golden["token_ids"], make_token_ids(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_load_to_the_same_parameters(name: str, open_model: Open):
    hub, fused = (nnx.to_flat_state(nnx.state(open_model(name, at))) for at in ("hub", "fused"))
    assert [path for path, _ in hub] == [path for path, _ in fused]
    for (_, one), (_, other) in zip(hub, fused, strict=True):
        np.testing.assert_array_equal(one[...], other[...])


@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_is_read_as_by_the_reference(name: str, open_model: Open):
    """Logits, hidden states of each layer, router logits and chosen experts."""
    golden, _ = read_golden(name)
    assert_parity(read_prompt(open_model(name, "fused"), golden["token_ids"]), golden)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_reference(name: str, open_model: Open):
    """And so are the logits of every step, with the prompt and all but the last in a cache."""
    golden, _ = read_golden(name)
    found = generate(open_model(name, "hub"), golden["token_ids"], NUM_NEW_TOKENS)
    assert_parity(found, golden)


@pytest.mark.parametrize("implementation", EXPERTS)
def test_every_expert_computation_is_exact(implementation: str, open_model: Open):
    golden, _ = read_golden("gqa")
    found = read_prompt(open_model("gqa", "hub"), golden["token_ids"], implementation)
    assert_parity(found, golden)


def test_cache_agrees_with_reading_everything_at_once(open_model: Open):
    """What greedy decode saw token by token, read as one sequence without a cache."""
    golden, _ = read_golden("mlp-only-layers")
    whole = np.concatenate([golden["token_ids"], golden["greedy_token_ids"]], axis=1)
    found = read_prompt(open_model("mlp-only-layers", "hub"), whole[:, :-1])
    first = golden["token_ids"].shape[1] - 1
    assert_parity({"greedy_logits": found["logits"][:, first:]}, golden)


def test_shorter_prompt_is_padded_on_the_right(open_model: Open):
    """The short request goes on where its own prompt ends, over what the padding left behind."""
    golden, _ = read_golden("gqa")
    model, token_ids = open_model("gqa", "hub"), golden["token_ids"]
    short, longest = 10, token_ids.shape[1]
    padded = token_ids.copy()
    padded[1, short:] = 77
    cache = empty_cache(model.config, 2, longest + 4, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(longest), token_ids.shape)
    with jax.default_matmul_precision("highest"):
        logits, cache, _ = model(jnp.asarray(padded), positions, cache, experts="gather")
        found = [logits[1, short - 1]]
        for step in range(4):
            tokens = np.stack([golden["greedy_token_ids"][0, step], token_ids[1, short + step]])
            at = jnp.array([[longest + step], [short + step]])
            logits, cache, _ = model(jnp.asarray(tokens)[:, None], at, cache, experts="gather")
            found.append(logits[1, 0])
    expected = golden["logits"][1, short - 1 : short + 4]
    assert_parity({"logits": np.stack(found)}, {"logits": expected})


@pytest.mark.parametrize("detail", WRONG)
def test_wrong_detail_is_noticed(detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = WRONG[detail]
    golden, _ = read_golden(wrong.model)
    config = {**CONFIGS[wrong.model], **wrong.fields}
    weights = wrong.weights(make_weights(wrong.model))
    model = params.load(write_checkpoint(tmp_path, config, weights))
    wrong.code(monkeypatch)
    assert_noticed(read_prompt(model, golden["token_ids"]), golden, "logits")


@pytest.mark.parametrize("mistake", WRONG_CACHE)
def test_wrong_cache_is_noticed(mistake: str, open_model: Open, monkeypatch: pytest.MonkeyPatch):
    golden, _ = read_golden("gqa")
    model = open_model("gqa", "hub")
    WRONG_CACHE[mistake](monkeypatch)
    found = generate(model, golden["token_ids"], NUM_NEW_TOKENS)
    assert_noticed(found, golden, "greedy_logits")


def assert_noticed(found: Arrays, golden: Arrays, key: str) -> None:
    """The check fails, and on `key` not by a hair but by more than ten times the limit."""
    with pytest.raises(AssertionError):
        assert_parity(found, golden)
    assert deviations(found, golden)[key] > 10 * LIMITS[key]
