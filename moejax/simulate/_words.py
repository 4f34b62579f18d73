"""Sets of experts as bit masks, and the radix select that keeps the best of them.

A set is a tuple of 32-bit words, each an array over *lanes*: layers, or layers and capacities.
Words apart, lanes lie side by side in memory, so that one instruction serves many of them.
"""

import functools
import operator
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Real, UInt32

WORD_BITS = 32
_UNROLL = 8

Words: TypeAlias = tuple[UInt32[Array, "*lanes"], ...]


def pack(members: Bool[Array, "*lanes experts"]) -> Words:
    """The set of each row: expert e is bit e % 32 of word e // 32."""
    return pack_columns(jnp.moveaxis(members, -1, 0))


def pack_columns(members: Bool[Array, "experts ..."]) -> Words:
    """`pack` of rows that lie along the first axis."""
    bit = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((-1,) + (1,) * (members.ndim - 1))
    rows = [members[low : low + WORD_BITS] for low in range(0, len(members), WORD_BITS)]
    return tuple(
        jnp.left_shift(row.astype(jnp.uint32), bit[: len(row)]).sum(0, dtype=jnp.uint32)
        for row in rows
    )


def num_members(words: Words) -> Int[Array, "*lanes"]:
    """How many experts each set holds."""
    # Signed, since Triton counts the bits of no other words.
    counts = (jax.lax.population_count(word.astype(jnp.int32)) for word in words)
    return functools.reduce(operator.add, counts)


def intersect(left: Words, right: Words) -> Words:
    """Experts of both sets."""
    return tuple(a & b for a, b in zip(left, right, strict=True))


def unite(left: Words, right: Words) -> Words:
    """Experts of either set."""
    return tuple(a | b for a, b in zip(left, right, strict=True))


def rank_planes(score: Real[Array, "*lanes experts"]) -> tuple[Words, ...]:
    """Bit planes of the ranks of all experts, best 0 and ties to the lower index, low bits first.

    Counts pairwise: expert by expert against all, with the lanes side by side. A sort is an order
    of magnitude slower on a CPU, and comparing all pairs at once would hold them in memory.
    """
    *lanes, num_experts = score.shape
    columns = score.reshape(-1, num_experts).T
    index = jnp.arange(num_experts)[:, None]
    # A rank is at most num_experts - 1.
    small = jnp.uint8 if num_experts <= 256 else jnp.uint16

    def compare(other, rank):
        theirs = jax.lax.dynamic_index_in_dim(columns, other, 0)
        beaten = jnp.where(other < index, theirs >= columns, theirs > columns)
        return rank + beaten.astype(small)

    rank = jnp.zeros(columns.shape, small)
    rank = jax.lax.fori_loop(0, num_experts, compare, rank, unroll=_UNROLL)
    planes = (pack_columns((rank >> bit) & 1 == 1) for bit in range(num_rank_bits(num_experts)))
    return tuple(tuple(word.reshape(lanes) for word in plane) for plane in planes)


def as_int32(score: Real[Array, "*lanes"]) -> Int[Array, "*lanes"]:
    """Integers in the order of the scores, so that one program ranks them all."""
    if not jnp.issubdtype(score.dtype, jnp.floating):
        return score.astype(jnp.int32)
    # -0.0 equals 0.0 and must look equal; XLA would drop an addition of zero.
    wide = score.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(wide == 0, 0.0, wide), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def num_rank_bits(num_experts: int) -> int:
    """Bits of the highest rank, and at least one."""
    return max(1, (num_experts - 1).bit_length())


def keep_words(candidates: Words, planes: Sequence[Words], capacity: Int[Array, "*lanes"]) -> Words:
    """The best `capacity` of the candidates: a radix select over bit planes of their ranks.

    Args:
      candidates: Sets.
      planes: Of `rank_planes`; each lane broadcasts against those of `candidates`.
      capacity: How many to keep.
    """
    active, need = candidates, capacity
    kept = tuple(jnp.zeros_like(word) for word in candidates)
    for plane in reversed(planes):
        better = tuple(word & ~bit for word, bit in zip(active, plane, strict=True))
        count = num_members(better)
        fits = count <= need
        kept = tuple(jnp.where(fits, k | b, k) for k, b in zip(kept, better, strict=True))
        worse = intersect(active, tuple(plane))
        active = tuple(jnp.where(fits, w, b) for w, b in zip(worse, better, strict=True))
        need = jnp.where(fits, need - count, need)
    return tuple(jnp.where(need > 0, k | a, k) for k, a in zip(kept, active, strict=True))
