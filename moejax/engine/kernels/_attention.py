"""Attention of a decode step: one new token a request against its cached keys and values.

A program serves all query heads of one key/value head, so the cache is read once. A long cache is
split over programs whose answers a second kernel combines; those behind a request's position read
nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from ._parts import Launch, Part, launch, next_power_of_2

# A score below every other; finite, so that the difference of two is a number.
_NO_SCORE = -1e30
# Elements of a tile of keys: 64 places of a head of 128.
_TILE_ELEMENTS = 8192
# Caches up to so many places are not split: combining costs more than it gains.
_LONGEST_WHOLE = 512
# A split has 128 to 1,024 places, and there are about so many programs.
_SHORTEST_SPLIT, _LONGEST_SPLIT, _NUM_PROGRAMS = 128, 1024, 1024
# Splits that the second kernel reads at a time, at most.
_NUM_COMBINED = 64


class Rotation(NamedTuple):
    """Turns of the new tokens' queries and keys, the same in every layer.

    Attributes:
      cos: Cosine of each feature's angle.
      sin: Sine of each feature's angle, negative in the first half of a head.
    """

    cos: Float[Array, "batch head_dim"]
    sin: Float[Array, "batch head_dim"]


class _Flash(NamedTuple):
    """Softmax over the places read so far: greatest score, sum of weights, weighted values."""

    greatest: Array
    total: Array
    values: Array


def rotation(
    positions: Int32[Array, " batch"], head_dim: int, theta: float, dtype: DTypeLike
) -> Rotation:
    """Angles of the tokens at `positions`, rounded to the model's type as the model does it."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None].astype(jnp.float32) * frequencies[None, :]
    cos, sin = (f(angles).astype(dtype).astype(jnp.float32) for f in (jnp.cos, jnp.sin))
    return Rotation(jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1))


def split_length(num_positions: int, batch_size: int, num_kv_heads: int) -> int | None:
    """Places of a cache that one program reads; None where the cache is not split."""
    if num_positions <= _LONGEST_WHOLE:
        return None
    places = next_power_of_2(num_positions * batch_size * num_kv_heads) // _NUM_PROGRAMS
    return min(max(places, _SHORTEST_SPLIT), _LONGEST_SPLIT)


def attention(
    positions: Int32[Array, " batch"],
    turns: Rotation,
    qkv: Float[Array, "qkv batch_pad"],
    keys: Float[Array, "batch positions kv_heads head_dim"],
    values: Float[Array, "batch positions kv_heads head_dim"],
    *,
    split: int | None = None,
    how: Launch | None = None,
) -> tuple[
    Float[Array, "queries batch_pad"],
    Float[Array, "batch positions kv_heads head_dim"],
    Float[Array, "batch positions kv_heads head_dim"],
]:
    """Attends to the cache up to each request's position and adds the new token to it.

    Args:
      positions: Place of each request's new token. One beyond the cache is not stored.
      turns: From `rotation`, for the same positions.
      qkv: Queries, keys and values of the new tokens, before they are turned.
      keys: One layer's cache, updated in place.
      values: The same of the values.
      split: Places that one program reads, a power of two; None chooses by `split_length`.
      how: How the kernels run; None takes 4 warps.

    Returns:
      What the heads gathered, and the cache. Columns of requests that do not exist are undefined.

    Reference:
      Dao et al., "Flash-Decoding for long-context inference", 2023, for the split.
    """
    how = how or Launch()
    batch, num_positions, num_kv_heads, _ = keys.shape
    split = split or split_length(num_positions, batch, num_kv_heads) or num_positions
    read = _read_part(positions, turns, qkv, keys, values, split)
    _, ((*answers, keys, values),) = launch("attention", [read], how)
    if split >= num_positions:
        return answers[0], keys, values
    greatest, total, gathered = answers
    combine = _combine_part(positions, greatest, total, gathered, split, num_positions, qkv)
    _, ((attended,),) = launch("combine_attention", [combine], how)
    return attended, keys, values


def _read_part(
    positions: Array, turns: Rotation, qkv: Array, keys: Array, values: Array, split: int
) -> Part:
    """Reads the cache; its outputs are the answer, or where it is split the `_Flash` of each."""
    batch, num_positions, num_kv_heads, head_dim = keys.shape
    num_queries = qkv.shape[0] - 2 * num_kv_heads * head_dim
    num_groups = num_queries // (num_kv_heads * head_dim)
    num_splits = pl.cdiv(num_positions, split)
    # The more queries share a tile of keys, the fewer registers are left for it.
    elements = _TILE_ELEMENTS // max(1, num_groups // 2)
    block = _power_of_2_within(min(max(elements // head_dim, 1), num_positions, split))

    def body(program, *refs):
        num_refs = 6 + num_answers + 2
        position_ref, cos_ref, sin_ref, qkv_ref, key_ref, value_ref, *answers = refs[-num_refs:]
        head = jax.lax.rem(program, num_kv_heads)
        request = jax.lax.rem(jax.lax.div(program, num_kv_heads), batch)
        number = jax.lax.div(program, num_kv_heads * batch)
        position = position_ref[request]
        first = number * split
        last = jnp.minimum(jnp.minimum(position, num_positions), first + split)

        # The first split has the new token at least.
        @pl.when((number == 0) | (first < last))
        def _():
            cos, sin = cos_ref[request, :], sin_ref[request, :]
            row = num_queries + head * head_dim
            key = _turned(qkv_ref, row, request, cos, sin)
            value = qkv_ref[pl.ds(row + num_kv_heads * head_dim, head_dim), request]
            queries = [
                _turned(qkv_ref, (head * num_groups + group) * head_dim, request, cos, sin)
                for group in range(num_groups)
            ]

            @pl.when((number == 0) & (position < num_positions))
            def _():
                key_ref[request, position, head, :] = key.astype(key_ref.dtype)
                value_ref[request, position, head, :] = value.astype(value_ref.dtype)

            def begin(query):
                score = jnp.sum(query * key) * head_dim**-0.5
                one = (number == 0).astype(jnp.float32)
                return _Flash(jnp.where(number == 0, score, _NO_SCORE), one, one * value)

            def read(index, states):
                start = first + index * block
                # The last tile is moved back into the cache and what it repeats not seen again.
                at = jnp.minimum(start, num_positions - block)
                places = at + jnp.arange(block, dtype=jnp.int32)
                is_seen = (places >= start) & (places < last)
                tile = (request, pl.ds(at, block), head, slice(None))
                cached, carried = (ref[tile].astype(jnp.float32) for ref in (key_ref, value_ref))
                found = []
                for query, state in zip(queries, states, strict=True):
                    scores = jnp.sum(cached * query[None, :], axis=1) * head_dim**-0.5
                    scores = jnp.where(is_seen, scores, _NO_SCORE)
                    found.append(_join(state, scores, jnp.ones_like(scores), carried))
                return found

            num_tiles = jax.lax.div(last - first + (block - 1), block)
            states = jax.lax.fori_loop(0, num_tiles, read, [begin(query) for query in queries])
            for group, state in enumerate(states):
                query_head = head * num_groups + group
                if num_splits == 1:
                    _write(answers[0], query_head, request, state)
                else:
                    for ref, field in zip(answers[:num_answers], state, strict=True):
                        ref[(request, query_head, number, *[slice(None)] * field.ndim)] = field

    if num_splits == 1:
        outputs = [jax.ShapeDtypeStruct((num_queries, qkv.shape[1]), qkv.dtype)]
    else:
        shape = (batch, num_queries // head_dim, next_power_of_2(num_splits))
        shapes = (shape, shape, (*shape, head_dim))
        outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    num_answers = len(outputs)
    outputs += [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (keys, values)]
    return Part(
        num_programs=num_splits * batch * num_kv_heads,
        body=body,
        inputs=(positions, turns.cos, turns.sin, qkv, keys, values),
        outputs=tuple(outputs),
        updates=((4, num_answers), (5, num_answers + 1)),
    )


def _combine_part(
    positions: Array,
    greatest: Array,
    total: Array,
    gathered: Array,
    split: int,
    num_positions: int,
    qkv: Array,
) -> Part:
    """Joins the splits that a request's position reaches, always in the same order."""
    batch, num_heads, num_splits, head_dim = gathered.shape
    block = min(_NUM_COMBINED, num_splits)

    def body(program, *refs):
        position_ref, greatest_ref, total_ref, gathered_ref, attended_ref = refs[-5:]
        head, request = jax.lax.rem(program, num_heads), jax.lax.div(program, num_heads)
        num_places = jnp.minimum(position_ref[request], num_positions)
        num_read = jnp.maximum(jax.lax.div(num_places + (split - 1), split), 1)

        def read(index, state):
            at = (request, head, pl.ds(index * block, block))
            # The others were not written: what they hold may not even be a number.
            is_read = index * block + jnp.arange(block, dtype=jnp.int32) < num_read
            scores = jnp.where(is_read, greatest_ref[at], _NO_SCORE)
            counts = jnp.where(is_read, total_ref[at], 0.0)
            values = jnp.where(is_read[:, None], gathered_ref[(*at, slice(None))], 0.0)
            return _join(state, scores, counts, values)

        nothing = jnp.zeros(head_dim, jnp.float32)
        start = _Flash(jnp.float32(_NO_SCORE), jnp.float32(0), nothing)
        num_blocks = jax.lax.div(num_read + (block - 1), block)
        _write(attended_ref, head, request, jax.lax.fori_loop(0, num_blocks, read, start))

    return Part(
        num_programs=batch * num_heads,
        body=body,
        inputs=(positions, greatest, total, gathered),
        outputs=(jax.ShapeDtypeStruct((num_heads * head_dim, qkv.shape[1]), qkv.dtype),),
    )


def _join(state: _Flash, scores: Array, counts: Array, values: Array) -> _Flash:
    """Adds places of given scores; a split counts as the places that it has summed up."""
    greatest = jnp.maximum(state.greatest, jnp.max(scores))
    weights, kept = jnp.exp(scores - greatest), jnp.exp(state.greatest - greatest)
    return _Flash(
        greatest,
        state.total * kept + jnp.sum(weights * counts),
        state.values * kept + jnp.sum(weights[:, None] * values, axis=0),
    )


def _turned(ref, row: Array, request: Array, cos: Array, sin: Array) -> Array:
    """A query or key of one head turned by its position, rounded to the model's type."""
    features = jnp.arange(cos.shape[0], dtype=jnp.int32)
    opposite = jax.lax.rem(features + cos.shape[0] // 2, cos.shape[0])
    x, other = ref[row + features, request], ref[row + opposite, request]
    turned = x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin
    return turned.astype(ref.dtype).astype(jnp.float32)


def _write(ref, head: Array, request: Array, state: _Flash) -> None:
    head_dim = state.values.shape[0]
    answer = (state.values / state.total).astype(ref.dtype)
    ref[pl.ds(head * head_dim, head_dim), request] = answer


def _power_of_2_within(size: int) -> int:
    return 1 << (size.bit_length() - 1)
