"""Attention of a decode step against the model's, whole and split, and its lowering for a GPU."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import ShapeDtypeStruct

from moejax.engine.kernels._attention import attention, rotation, split_length
from moejax.engine.kernels._dense import output_part, qkv_part
from moejax.engine.kernels._dense_weights import pack_dense
from moejax.engine.kernels._parts import launch, layer_number

from ._lowering import count_kernels, lower_for_gpu
from ._tiny import CONFIG, INTERPRETED, error, pad, tiny_model

HEAD_DIM, NUM_KV_HEADS, NUM_POSITIONS = 16, 2, 40
TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 3e-2}


class Inputs(NamedTuple):
    positions: jax.Array
    qkv: jax.Array
    keys: jax.Array
    values: jax.Array


def draw(positions: list[int], num_positions: int = NUM_POSITIONS, num_heads: int = 6) -> Inputs:
    """Random queries, keys and values; what lies behind a position is large, to be noticed."""
    generator = np.random.default_rng(1)
    batch = len(positions)
    shape = (batch, num_positions, NUM_KV_HEADS, HEAD_DIM)
    keys, values = generator.normal(size=(2, *shape))
    for request, position in enumerate(positions):
        keys[request, position:], values[request, position:] = 30, 1e4
    qkv = 2 * generator.normal(size=(batch, (num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM))
    narrow = (jnp.asarray(x, jnp.float32) for x in (qkv, keys, values))
    return Inputs(jnp.array(positions, jnp.int32), *narrow)


@partial(jax.jit, static_argnames=("split", "filling"))
def attend(inputs: Inputs, split: int | None = None, filling: float = 0.0):
    batch = len(inputs.positions)
    turns = rotation(inputs.positions, HEAD_DIM, CONFIG.rope_theta, inputs.qkv.dtype)
    attended, keys, values = attention(
        inputs.positions,
        turns,
        pad(inputs.qkv, filling),
        inputs.keys,
        inputs.values,
        split=split,
        how=INTERPRETED,
    )
    return attended.T[:batch], keys, values


@pytest.mark.parametrize(
    ("positions", "dtype"),
    [([23], jnp.bfloat16), ([0, 17, 39], jnp.float32)],
    ids=["one-bfloat16", "three-float32"],
)
def test_equals_the_layer(positions, dtype):
    """Projection, attention and projection back, with two requests' and three queries' heads."""
    model = tiny_model(dtype=dtype)
    layer, weights, inputs = model.layers[1], pack_dense(model).layers, draw(positions)
    keys, values = (x.astype(dtype) for x in (inputs.keys, inputs.values))
    generator = np.random.default_rng(2)
    x = jnp.asarray(generator.normal(size=(len(positions), CONFIG.hidden_size)), dtype)

    @jax.jit
    def run(x, keys, values):
        part = qkv_part(layer_number(1), weights, x, CONFIG.rms_norm_eps)
        _, ((qkv,),) = launch("qkv", [part], INTERPRETED)
        turns = rotation(inputs.positions, HEAD_DIM, CONFIG.rope_theta, dtype)
        attended, keys, values = attention(
            inputs.positions, turns, qkv, keys, values, how=INTERPRETED
        )
        part = output_part(layer_number(1), weights, x, attended)
        return launch("output", [part], INTERPRETED)[1][0][0], keys, values

    found, *cache = run(pad(x), keys, values)
    ask = nnx.jit(lambda layer, *inputs: layer.attend(*inputs))
    wanted, wanted_cache = ask(layer, x[:, None], inputs.positions[:, None], (keys, values))
    assert error(found.T[: len(positions)], wanted[:, 0]) < TOLERANCE[dtype]
    for new, old, right in zip(cache, (keys, values), wanted_cache, strict=True):
        for request, position in enumerate(positions):
            stored = new[request, position]
            assert error(stored, right[request, position]) < TOLERANCE[dtype]
            others = [place for place in range(NUM_POSITIONS) if place != position]
            np.testing.assert_array_equal(new[request][others, :], old[request][others, :])


@pytest.mark.parametrize("num_heads", [2, 8])
def test_split_equals_whole(num_heads):
    """One request ends in the first split, one at the edge of two, one in the last."""
    inputs = draw([5, 16, 39], num_heads=num_heads)
    whole, split = attend(inputs), attend(inputs, split=16)
    assert error(split[0], whole[0]) < 2e-6
    for found, wanted in zip(split[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_more_splits_than_are_combined_at_a_time():
    inputs = draw([1090], num_positions=1100, num_heads=2)
    assert error(attend(inputs, split=16)[0], attend(inputs, split=2048)[0]) < 2e-6


@pytest.mark.parametrize("split", [None, 16])
def test_padding_columns_do_no_harm(split):
    inputs = draw([5, 16, 39])
    for found, beside_junk in zip(
        attend(inputs, split), attend(inputs, split, jnp.nan), strict=True
    ):
        np.testing.assert_array_equal(found, beside_junk)


def test_a_request_does_not_see_the_others():
    """Of three requests each gets what it gets when all are at its place."""
    inputs = draw([5, 16, 39])
    together = attend(inputs)[0]
    for request, position in enumerate((5, 16, 39)):
        alone = attend(inputs._replace(positions=jnp.full(3, position, jnp.int32)))[0]
        np.testing.assert_array_equal(together[request], alone[request])


@pytest.mark.parametrize("split", [None, 16])
def test_a_place_beyond_the_cache_is_dropped(split):
    inputs = draw([NUM_POSITIONS, NUM_POSITIONS + 3])
    attended, keys, values = attend(inputs, split)
    assert jnp.isfinite(attended).all()
    np.testing.assert_array_equal(keys, inputs.keys)
    np.testing.assert_array_equal(values, inputs.values)


def test_long_caches_are_split():
    assert split_length(512, 16, 16) is None
    assert split_length(1024, 1, 16) == 128
    assert split_length(8192, 1, 16) == 128
    assert split_length(8192, 4, 16) == 512
    assert split_length(32768, 16, 16) == 1024


@pytest.mark.parametrize("num_kv_heads", [16, 4])
@pytest.mark.parametrize("num_positions", [512, 8192])
@pytest.mark.parametrize("batch", [1, 16])
def test_lowers_for_a_gpu(batch, num_positions, num_kv_heads):
    """At the size of Qwen1.5-MoE-A2.7B, also with grouped queries; needs no GPU."""
    array = partial(ShapeDtypeStruct, dtype=jnp.bfloat16)
    cache = array((batch, num_positions, num_kv_heads, 128))

    def run(positions, qkv, keys, values):
        turns = rotation(positions, 128, 1e6, qkv.dtype)
        return attention(positions, turns, qkv, keys, values)

    qkv = array(((16 + 2 * num_kv_heads) * 128, batch))
    program = lower_for_gpu(run, ShapeDtypeStruct((batch,), jnp.int32), qkv, cache, cache)
    assert count_kernels(program) == (1 if num_positions == 512 else 2)
