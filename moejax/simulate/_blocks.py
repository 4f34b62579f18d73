"""Traces of any length, a block of steps at a time."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped, UInt8

from moejax.simulate._replay import Moment, Replay
from moejax.strategies import NEVER, CacheShape
from moejax.trace import known_ids

BLOCK_STEPS = 256


class Stream(NamedTuple):
    """Batched routing of any length, of which only ids are held.

    `replay` holds a table of all experts for every step; a stream makes that of one block of
    steps at a time, so a trace may be as long as the disk, or a memory map, holds ids.

    Attributes:
      experts: Demanded ids; those from `num_experts` on are none. Traces of one length may lie
        side by side as lanes.
      num_experts: Experts a layer.
      coming: For each block, the step at which each expert is demanded first after the step that
        follows the block, `NEVER` if none; None where no oracle looks.
    """

    experts: Shaped[np.ndarray, "steps *lanes layers width"]
    num_experts: int
    coming: Int[np.ndarray, "blocks *lanes layers experts"] | None = None


def stream(
    experts: Shaped[np.ndarray, "steps *lanes layers width"],
    num_experts: int,
    *,
    with_future: bool = True,
) -> Stream:
    """Prepares batched routing, as `batch_trace` gives it, to be replayed block by block.

    Args:
      experts: Demanded ids; may be a memory map. Lanes are traces that do not touch each other,
        such as those of several seeds.
      num_experts: Experts a layer.
      with_future: Whether to find each next use, which only the oracle reads: one number an
        expert and block.
    """
    if not with_future:
        return Stream(experts, num_experts)
    num_steps, *rows, width = experts.shape
    starts = range(0, num_steps, BLOCK_STEPS)
    flat = np.arange(math.prod(rows))[None, :, None]
    first = np.full((len(starts) + 1, flat.size, num_experts + 1), NEVER, np.int32)
    for block, start in enumerate(starts):
        # Behind the step after the block before, up to the step after this one. Backwards, so
        # that the first use of an expert is what stays.
        ids = known_ids(experts[start + 1 : start + BLOCK_STEPS + 1][::-1], num_experts)
        ids = ids.reshape(len(ids), flat.size, width)
        steps = np.arange(start + len(ids), start, -1, dtype=np.int32)
        first[block, flat, ids] = np.broadcast_to(steps[:, None, None], ids.shape)
    coming = np.minimum.accumulate(first[:0:-1], axis=0)[::-1, :, :num_experts]
    return Stream(experts, num_experts, coming.reshape(len(starts), *rows, num_experts))


class Block(NamedTuple):
    """`BLOCK_STEPS` steps of a replay, as they go to the device.

    Attributes:
      start: Number of the first step.
      rows: Demand of the steps from the one before to the one after, or ids in a `Stream`.
      coming: `Replay.next_use` of the steps to the one after, or of that one alone in a `Stream`;
        None where nobody looks.
      lookahead: `Replay.lookahead` of the steps, or None.
    """

    start: Int[np.ndarray | Array, ""]
    rows: Shaped[np.ndarray | Array, "steps *lanes layers columns"]
    coming: Int[np.ndarray | Array, "*steps layers experts"] | None
    lookahead: UInt8[np.ndarray | Array, "steps layers depth experts"] | None


def block_at(source: Replay | Stream, start: int, *, with_future: bool, with_gates: bool) -> Block:
    """The steps from `start`, with what a strategy reads of them; past the end is no demand."""
    stop, coming, said = start + BLOCK_STEPS, None, None
    if isinstance(source, Stream):
        if with_future and source.coming is not None:
            coming = source.coming[start // BLOCK_STEPS]
        rows = _host_rows(source.experts, start - 1, stop + 1, source.num_experts)
        return Block(np.asarray(start, np.int32), rows, coming, None)
    rows = _host_rows(source.demand, start - 1, stop + 1, 0)
    if with_future and source.next_use is not None:
        coming = _host_rows(source.next_use, start, stop + 1, NEVER)
    if with_gates and source.lookahead is not None:
        said = _host_rows(source.lookahead, start, stop, 0)
    return Block(np.asarray(start, np.int32), rows, coming, said)


def moments_of(block: Block, shape: CacheShape, *, is_stream: bool) -> Moment:
    """The moments of a block, stacked along `steps`, for a scan."""
    rows, coming = jnp.asarray(block.rows), block.coming
    if is_stream:
        ids = jnp.arange(shape.num_experts, dtype=rows.dtype)
        small = jnp.uint8 if rows.shape[-1] < 256 else jnp.int32
        rows = (rows[..., None] == ids[None, None, None]).sum(-2, dtype=small)
    steps = jnp.asarray(block.start) + jnp.arange(BLOCK_STEPS, dtype=jnp.int32)
    if coming is not None:
        table = jnp.asarray(coming)
        if is_stream:

            def earlier(known, step):
                number, demand = step
                known = jnp.where(demand > 0, number + 1, known)
                return known, known

            _, table = jax.lax.scan(earlier, table, (steps, rows[2:]), reverse=True)
            table = jnp.concatenate([table, jnp.asarray(coming)[None]])
        coming = jnp.stack([table[:-1], table[1:]], axis=1)
    said = None if block.lookahead is None else jnp.asarray(block.lookahead)
    return Moment(steps, rows[:-2], rows[1:-1], rows[2:], coming, said)


def _host_rows(
    table: Shaped[np.ndarray | Array, "steps ..."], start: int, stop: int, filling: int
) -> Shaped[np.ndarray, "rows ..."]:
    """Rows `start` to `stop`, filled up where they lie outside the table."""
    inside = np.asarray(table[max(start, 0) : max(min(stop, len(table)), 0)])
    if filling > np.iinfo(inside.dtype).max:
        inside = inside.astype(np.uint16)
    above = max(-start, 0)
    if len(inside) == stop - start:
        return inside
    rows = np.full((stop - start, *inside.shape[1:]), filling, inside.dtype)
    rows[above : above + len(inside)] = inside
    return rows
