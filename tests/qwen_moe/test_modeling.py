"""What holds for every model of the family, on small random ones."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.qwen_moe import (
    EXPERTS,
    Lookahead,
    QwenMoe,
    RoutedExperts,
    abstract,
    empty_cache,
)

from ..engine import _tiny
from ..engine._tiny import random_model

CONFIG = dataclasses.replace(
    _tiny.CONFIG,
    vocab_size=40,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
TOKEN_IDS = jax.random.randint(jax.random.key(3), (2, 7), 0, CONFIG.vocab_size)
POSITIONS = jnp.broadcast_to(jnp.arange(7), (2, 7))


@pytest.fixture(scope="module")
def model() -> QwenMoe:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def read(model) -> Callable:
    return compiled(model)


@pytest.fixture(scope="module")
def full(read):
    """Logits, cache and routing of both requests, read at once."""
    return read(TOKEN_IDS, POSITIONS)


def compiled(model: QwenMoe) -> Callable:
    """The model's call as one program a shape: faster than operation by operation."""
    return jax.jit(lambda *inputs: model(*inputs))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_shapes(full):
    logits, cache, routings = full
    assert logits.shape == (2, 7, CONFIG.vocab_size)
    assert logits.dtype == jnp.float32
    assert [array.shape for array in cache.keys + cache.values] == [(2, 7, 2, 4)] * 8
    assert len(routings) == len(CONFIG.moe_layers) == 3
    for routing in routings:
        assert routing.selected_experts.shape == routing.routing_weights.shape == (14, 2)
        assert routing.selected_experts.dtype == jnp.int32
        assert routing.router_logits.shape == (14, 6)
        assert routing.lookahead is None


def test_routing_is_of_the_logits(full):
    for routing in full[2]:
        probabilities = jax.nn.softmax(routing.router_logits, axis=-1)
        order = np.argsort(-np.asarray(probabilities), axis=-1)[:, :2]
        np.testing.assert_array_equal(routing.selected_experts, order)
        assert_close(
            routing.routing_weights, np.take_along_axis(np.asarray(probabilities), order, axis=-1)
        )
        assert float(routing.routing_weights.sum(-1).max()) < 1.0


def test_normed_routing_weights_sum_to_one():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, norm_topk_prob=True)
    _, _, (routing,) = compiled(random_model(config))(TOKEN_IDS, POSITIONS)
    assert_close(routing.routing_weights.sum(-1), np.ones(14))


def test_no_token_sees_a_later_one(read, full):
    changed = TOKEN_IDS.at[:, -1].set((TOKEN_IDS[:, -1] + 1) % CONFIG.vocab_size)
    logits, _, _ = read(changed, POSITIONS)
    assert_close(logits[:, :-1], full[0][:, :-1])
    assert float(jnp.abs(logits[:, -1] - full[0][:, -1]).max()) > 1e-2


def test_decoding_with_a_cache_is_reading_at_once(read, full):
    logits, cache, _ = read(
        TOKEN_IDS[:, :4], POSITIONS[:, :4], empty_cache(CONFIG, 2, 10, jnp.float32)
    )
    assert_close(logits, full[0][:, :4])
    for step in range(4, 7):
        at = slice(step, step + 1)
        logits, cache, _ = read(TOKEN_IDS[:, at], POSITIONS[:, at], cache)
        assert_close(logits, full[0][:, at])
    for found, expected in zip(cache.keys, full[1].keys, strict=True):
        assert_close(found[:, :7], expected)


def test_padding_on_the_right_changes_nothing(read, full):
    """The second prompt ends after 5 tokens; what fills it up is overwritten by decoding."""
    padded = TOKEN_IDS.at[1, 5:].set(0)
    logits, cache, _ = read(padded, POSITIONS, empty_cache(CONFIG, 2, 10, jnp.float32))
    assert_close(logits[0], full[0][0])
    assert_close(logits[1, :5], full[0][1, :5])
    # The first request goes on at 7, the second at 5.
    newest = jnp.stack([jnp.int32(1), TOKEN_IDS[1, 5]])[:, None]
    logits, _, _ = read(newest, jnp.array([[7], [5]]), cache)
    assert_close(logits[1, 0], full[0][1, 5])


def test_a_place_beyond_the_cache_is_dropped(read):
    cache = empty_cache(CONFIG, 2, 10, jnp.float32)
    _, after, _ = read(TOKEN_IDS[:, :1], jnp.array([[9], [10]]), cache)
    for array in jax.tree.leaves(after):
        assert float(jnp.abs(array[0, 9]).min()) > 0
        assert not array[0, :9].any()
        assert not array[1].any()


def test_lookahead_is_what_the_next_gates_say(model, full):
    lookahead = Lookahead(depth=2, width=3)
    routings, streams = jax.jit(
        lambda *inputs: (model(*inputs, lookahead=lookahead)[2], read_streams(model, *inputs))
    )(TOKEN_IDS, POSITIONS)
    for routing, plain, number in zip(routings, full[2], CONFIG.moe_layers, strict=True):
        np.testing.assert_array_equal(routing.selected_experts, plain.selected_experts)
        assert routing.lookahead.shape == (14, 2, 3)
        following = [later for later in CONFIG.moe_layers if later > number]
        for depth in range(2):
            if depth < len(following):
                layer = model.layers[following[depth]]
                normed = layer.post_attention_layernorm(streams[number]).reshape(14, -1)
                scores = np.asarray(normed @ layer.mlp.gate.weight[...].T)
                expected = np.argsort(-scores, axis=-1)[:, :3]
            else:
                expected = np.full((14, 3), -1)
            np.testing.assert_array_equal(routing.lookahead[:, depth], expected)


def read_streams(model: QwenMoe, token_ids: jax.Array, positions: jax.Array) -> list[jax.Array]:
    """What enters the experts of each layer, before the norm."""
    x, streams = model.embed_tokens(token_ids), []
    for layer in model.layers:
        x, _ = layer.attend(x, positions)
        streams.append(x)
        x, _ = layer.feed_forward(x)
    return streams


def test_the_routed_experts_split_off(model, full):
    graph, routed, rest = nnx.split(model, RoutedExperts, ...)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(routed)}
    assert paths == {
        f"layers.{layer}.mlp.experts.{part}"
        for layer in CONFIG.moe_layers
        for part in ("gate_up_proj", "down_proj")
    }
    assert not any("experts." in ".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
    logits, _, _ = compiled(nnx.merge(graph, routed, rest))(TOKEN_IDS, POSITIONS)
    assert_close(logits, full[0])


def test_an_abstract_model_holds_shapes_only():
    # A layer with experts and one without.
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    shapes = jax.tree.leaves(nnx.state(abstract(config, jnp.bfloat16)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)
    assert {leaf.dtype for leaf in shapes} == {jnp.dtype(jnp.bfloat16)}
    # Random numbers of the kind that compiles fastest.
    key = jax.random.key(0, impl="unsafe_rbg")
    weights = jax.tree.leaves(
        jax.jit(lambda: nnx.state(QwenMoe(config, rngs=nnx.Rngs(key), dtype=jnp.bfloat16)))()
    )
    assert [(leaf.shape, leaf.dtype) for leaf in shapes] == [
        (weight.shape, weight.dtype) for weight in weights
    ]


def test_a_tied_head_is_the_embedding():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=True)
    model = random_model(config)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert "embed_tokens.weight" in paths
    assert not any(path.startswith("lm_head") for path in paths)
    hidden = jax.random.normal(jax.random.key(5), (3, CONFIG.hidden_size))
    assert_close(model.logits(hidden), hidden @ model.embed_tokens.weight[...].T)


def test_biases_can_be_left_out():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, qkv_bias=False)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract(config, jnp.float32)))]
    assert not any("bias" in path for path in paths)
    assert any("bias" in path for path, _ in nnx.to_flat_state(nnx.state(abstract(CONFIG, "f4"))))


def test_activations_have_the_type_of_the_weights():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    model = with_dtype(random_model(config), jnp.bfloat16)
    hidden, cache, (routing,) = jax.jit(lambda *inputs: model.hidden_states(*inputs))(
        TOKEN_IDS, POSITIONS
    )
    assert hidden.dtype == cache.keys[0].dtype == jnp.bfloat16
    assert routing.routing_weights.dtype == model.logits(hidden).dtype == jnp.float32


def with_dtype(model: QwenMoe, dtype: jnp.dtype) -> QwenMoe:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda weight: weight.astype(dtype), state))


def test_an_experts_function_is_called_once_a_layer(model, full):
    called = []

    def scan(x, *arguments):
        called.append(x.shape)
        return EXPERTS["scan"](x, *arguments)

    read = jax.jit(lambda *inputs: model(*inputs, experts=scan))
    logits, _, _ = read(TOKEN_IDS, POSITIONS)
    assert called == [(14, CONFIG.hidden_size)] * 3
    assert_close(logits, full[0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_weights_give_nearly_the_same_logits(model, full, dtype):
    cache = empty_cache(CONFIG, 2, 8, dtype)
    logits, cache, _ = compiled(with_dtype(model, dtype))(TOKEN_IDS, POSITIONS, cache)
    assert cache.keys[0].dtype == dtype
    wide = full[0]
    # One router may choose otherwise; most tokens agree.
    errors = jnp.abs(logits - wide).max(-1) / jnp.abs(wide).max()
    assert jnp.median(errors) < (2e-3 if dtype == jnp.float16 else 2e-2)
