"""Routed experts for training: buckets of equal size, all movement of tokens as gathers."""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

TABLES = "dispatch tables"
"""What `jax.checkpoint` policies call the tables that say where a token goes."""

# A matrix unit's tile: rows of a bucket are a multiple of it.
_ROW_TILE = 64


def bucketed(capacity_ratio: float) -> Callable[..., Array]:
    """Experts that compute buckets of equal size, for training.

    A bucket holds `capacity_ratio` times the mean number of tokens of an expert; first choices
    are placed before second ones, and pairs that find their bucket full are dropped. Everything
    is a gather, forward and backward, around three batched matrix products.

    Reference:
      Lepikhin et al., "GShard", arXiv:2006.16668, section 2.2.
    """

    def compute(x, selected_experts, routing_weights, gate_up_proj, down_proj):
        num_tokens, topk = selected_experts.shape
        num_experts = gate_up_proj.shape[0]
        capacity = bucket_rows(num_tokens * topk, num_experts, capacity_ratio)
        pair_of_row, row_of_pair = _place_pairs(selected_experts, num_experts, capacity)
        pair_of_row, row_of_pair = checkpoint_name((pair_of_row, row_of_pair), TABLES)
        # An empty row stands for no pair, and so for no token.
        is_empty = pair_of_row == num_tokens * topk
        token_of_row = jnp.where(is_empty, num_tokens, pair_of_row % num_tokens)[None, :]
        rows_of_token = row_of_pair.reshape(topk, num_tokens)
        rows = _gather(x, token_of_row, rows_of_token).reshape(num_experts, capacity, -1)
        share = _gather(routing_weights.T.reshape(-1), pair_of_row[None, :], row_of_pair[None, :])
        gate_up = jnp.einsum("ech,efh->ecf", rows, gate_up_proj)
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        # Weighted before the down projection: the backward pass then needs no answer of it.
        y = jax.nn.silu(gate) * up * share.reshape(num_experts, capacity, 1)
        y = jnp.einsum("ecf,ehf->ech", y.astype(x.dtype), down_proj)
        return _gather(y.reshape(num_experts * capacity, -1), rows_of_token, token_of_row)

    return compute


def bucket_rows(num_pairs: int, num_experts: int, capacity_ratio: float) -> int:
    """Rows of one bucket."""
    rows = int(-(-num_pairs * capacity_ratio // num_experts))
    return min(-(-rows // _ROW_TILE) * _ROW_TILE, num_pairs)


def _place_pairs(selected_experts: Array, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Gives the pairs of each expert the rows of its bucket, first choices first.

    A pair is numbered choice * tokens + token.

    Returns:
      Pair of each row, the number of pairs where a row is empty; row of each pair, the number of
      rows where the pair is dropped.
    """
    num_pairs, num_rows = selected_experts.size, num_experts * capacity
    bits = max(1, (num_pairs - 1).bit_length())
    # One sort of unique integers, expert above pair: faster than a stable sort of two arrays.
    expert = selected_experts.T.reshape(-1).astype(jnp.uint32)
    key = jnp.sort((expert << bits) | jnp.arange(num_pairs, dtype=jnp.uint32))
    first_keys = jnp.arange(num_experts + 1, dtype=jnp.uint32) << bits
    first = (key[:, None] < first_keys[None, :]).sum(axis=0, dtype=jnp.int32)
    pair = (key & ((1 << bits) - 1)).astype(jnp.int32)
    expert = (key >> bits).astype(jnp.int32)
    rank = jnp.arange(num_pairs, dtype=jnp.int32) - first[expert]
    row = jnp.where(rank < capacity, expert * capacity + rank, num_rows)
    row_of_pair = jnp.zeros(num_pairs, jnp.int32).at[pair].set(row, unique_indices=True)
    place = first[:-1, None] + jnp.arange(capacity)[None, :]
    is_filled = place < first[1:, None]
    pair_of_row = jnp.where(is_filled, pair[jnp.minimum(place, num_pairs - 1)], num_pairs)
    return pair_of_row.reshape(-1), row_of_pair


@jax.custom_vjp
def _gather(x: Array, index: Array, inverse: Array) -> Array:
    """`y[m] = sum_j x[index[j, m]]`; a number beyond `x` adds nothing.

    `inverse[i, n]` are the places that read `x[n]`, so that the gradient is a gather too.
    """
    return _take_and_add(x, index)


def _gather_forward(x, index, inverse):
    return _take_and_add(x, index), inverse


def _gather_backward(inverse, gradient):
    return _take_and_add(gradient, inverse), None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _take_and_add(x: Array, index: Array) -> Array:
    rows = (x.at[places].get(mode="fill", fill_value=0) for places in index)
    return reduce(jnp.add, (row.astype(jnp.float32) for row in rows)).astype(x.dtype)
