"""A trace as the simulators read it: demand step by step, and the future for the oracle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from moejax.strategies import NEVER, Access, CacheShape, Future
from moejax.trace import demand_counts, next_use

MAX_DEPTH = 3
BLOCK_STEPS = 256


class Replay(NamedTuple):
    """Batched routing, ready to be replayed.

    Attributes:
      demand: Tokens that demand each expert.
      next_use: Step of the next demand of each expert after this step, `NEVER` if none; None
        where no oracle looks.
      lookahead: How high the gates of the next layers rank each expert, in 255ths: 255 for the
        best, 0 for one not named; None where unknown.
    """

    demand: Shaped[np.ndarray | Array, "*lanes steps layers experts"]
    next_use: Int[np.ndarray | Array, "*lanes steps layers experts"] | None = None
    lookahead: UInt8[np.ndarray | Array, "*lanes steps layers depth experts"] | None = None


def replay(
    experts: Shaped[np.ndarray, "steps layers width"],
    num_experts: int,
    *,
    with_future: bool = True,
    lookahead: Shaped[np.ndarray, "steps layers ahead places width"] | None = None,
) -> Replay:
    """Prepares batched routing, as `batch_trace` gives it, for the simulators.

    Args:
      experts: Demanded ids.
      num_experts: Experts a layer.
      with_future: Whether to find each next use, which only the oracle reads.
      lookahead: Ids that the gates of the next layers name for each place, best first.
    """
    demand = demand_counts(experts, num_experts)
    coming = None
    if with_future:
        coming = next_use(demand)
        coming[coming == len(demand)] = NEVER
    return Replay(demand, coming, None if lookahead is None else _ranked(lookahead, num_experts))


def _ranked(
    lookahead: Shaped[np.ndarray, "steps layers ahead places width"], num_experts: int
) -> UInt8[np.ndarray, "steps layers depth experts"]:
    """The highest rank any place gives each expert, in 255ths."""
    depth = lookahead.shape[1] - 1
    named = np.minimum(lookahead[:, :, :depth], num_experts).astype(np.intp)
    *lanes, places, width = named.shape
    said = np.zeros((*lanes, num_experts + 1), np.uint8)
    # Worst ranks first, so that the best one an expert gets is what stays.
    for rank in reversed(range(width)):
        for place in range(places):
            value = np.uint8(255 - 255 * rank // width)
            np.put_along_axis(said, named[..., place, rank, None], value, axis=-1)
    return said[..., :num_experts]


class Stream(NamedTuple):
    """Batched routing of any length, of which only ids are held.

    `replay` holds a table of all experts for every step; a stream makes that of one block of
    steps at a time, so a trace may be as long as the disk, or a memory map, holds ids.

    Attributes:
      experts: Demanded ids; those from `num_experts` on are none.
      num_experts: Experts a layer.
      coming: For each block, the step at which each expert is demanded first after the step that
        follows the block, `NEVER` if none; None where no oracle looks.
    """

    experts: Shaped[np.ndarray, "steps layers width"]
    num_experts: int
    coming: Int[np.ndarray, "blocks layers experts"] | None = None


def stream(
    experts: Shaped[np.ndarray, "steps layers width"],
    num_experts: int,
    *,
    with_future: bool = True,
) -> Stream:
    """Prepares batched routing, as `batch_trace` gives it, to be replayed block by block.

    Args:
      experts: Demanded ids; may be a memory map.
      num_experts: Experts a layer.
      with_future: Whether to find each next use, which only the oracle reads: one number an
        expert and block.
    """
    if not with_future:
        return Stream(experts, num_experts)
    num_steps, num_layers, _ = experts.shape
    starts = range(0, num_steps, BLOCK_STEPS)
    first = np.full((len(starts) + 1, num_layers, num_experts + 1), NEVER, np.int32)
    lanes = np.arange(num_layers)[None, :, None]
    for block, start in enumerate(starts):
        # Behind the step after the block before, up to the step after this one. Backwards, so
        # that the first use of an expert is what stays.
        ids = np.minimum(experts[start + 1 : start + BLOCK_STEPS + 1][::-1], num_experts)
        steps = np.arange(start + len(ids), start, -1, dtype=np.int32)
        first[block, lanes, ids] = np.broadcast_to(steps[:, None, None], ids.shape)
    coming = np.minimum.accumulate(first[:0:-1], axis=0)[::-1]
    return Stream(experts, num_experts, np.ascontiguousarray(coming[..., :num_experts]))


def cache_shape(
    demand: Shaped[np.ndarray | Array, "steps layers experts"], topk: int, depth: int = MAX_DEPTH
) -> CacheShape:
    """The static sizes of a replay, with prefetch at most `depth` layers ahead."""
    _, num_layers, num_experts = demand.shape
    return CacheShape(num_layers, num_experts, topk, min(depth, num_layers - 1))


class Moment(NamedTuple):
    """What is known at one step of a replay, for all its layers.

    Attributes:
      step: Step number.
      before, now, after: Demand of the step before, of this one and of the one after.
      next_use: `Replay.next_use` of this step and of the one after, or None.
      lookahead: `Replay.lookahead` of this step, or None.
    """

    step: Int[Array, ""]
    before: Int[Array, "layers experts"]
    now: Int[Array, "layers experts"]
    after: Int[Array, "layers experts"]
    next_use: Int[Array, "2 layers experts"] | None
    lookahead: UInt8[Array, "layers depth experts"] | None


def moments(replay: Replay, start: int = 0, stop: int | None = None) -> Moment:
    """The moments of the steps from `start` to `stop`, stacked along `steps`, for a scan.

    Steps past the end of the replay demand nothing.
    """
    stop = len(replay.demand) if stop is None else stop
    demand = _rows(replay.demand, start - 1, stop + 1, 0)
    coming = None
    if replay.next_use is not None:
        steps = _rows(replay.next_use, start, stop + 1, NEVER)
        coming = jnp.stack([steps[:-1], steps[1:]], axis=1)
    said = replay.lookahead
    return Moment(
        step=jnp.arange(start, stop, dtype=jnp.int32),
        before=demand[:-2],
        now=demand[1:-1],
        after=demand[2:],
        next_use=coming,
        lookahead=None if said is None else _rows(said, start, stop, 0),
    )


def _rows(
    table: Shaped[np.ndarray | Array, "steps ..."], start: int, stop: int, filling: int
) -> Array:
    """Rows `start` to `stop`, filled up where they lie outside the table."""
    inside = jnp.asarray(table[max(start, 0) : max(min(stop, len(table)), 0)])
    above, below = max(-start, 0), max(stop - max(len(table), start), 0)
    pads = [(above, below)] + [(0, 0)] * (inside.ndim - 1)
    return jnp.pad(inside, pads, constant_values=filling)


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
    rows: Shaped[np.ndarray | Array, "steps layers columns"]
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


def layer_accesses(
    moment: Moment,
    shape: CacheShape,
    resident: Shaped[Array, "layers experts"],
    capacity: Int[Array, " layers"],
) -> Access:
    """`access_at` of all layers, stacked along a leading axis.

    What most strategies read is sliced, not gathered: on a CPU that takes a tenth of the time.
    """
    layers = jnp.arange(shape.num_layers, dtype=jnp.int32)
    access = jax.vmap(lambda layer: access_at(moment, layer, shape, resident, capacity))(layers)
    now = moment.now.astype(jnp.int32)
    future = access.future
    if moment.next_use is not None:
        steps = moment.next_use[0]
        events = steps * shape.num_layers + layers[:, None]
        future = future._replace(next_use=jnp.where(steps < NEVER, events, NEVER))
    return access._replace(
        demand=now,
        above=jnp.concatenate([moment.before[-1:].astype(jnp.int32), now[:-1]]),
        resident=resident,
        capacity=capacity,
        future=future,
    )


def access_at(
    moment: Moment,
    layer: Int[Array, ""],
    shape: CacheShape,
    resident: Shaped[Array, "layers experts"],
    capacity: Int[Array, " layers"],
) -> Access:
    """The event of one layer as a strategy may see it."""
    layers, depth = shape.num_layers, shape.depth
    rows = jnp.concatenate([moment.before, moment.now, moment.after]).astype(jnp.int32)
    ahead = (layer + 1 + jnp.arange(depth)) % layers
    return Access(
        event=moment.step * layers + layer,
        layer=layer,
        demand=rows[layers + layer],
        above=rows[layers + layer - 1],
        below_before=rows[layer + 1 + jnp.arange(depth)],
        resident=resident[layer],
        resident_ahead=resident[ahead],
        capacity=capacity[layer],
        capacity_ahead=capacity[ahead],
        lookahead=_said(moment, layer, shape),
        future=_future(moment, rows, layer, shape),
    )


def _future(moment: Moment, rows, layer, shape: CacheShape) -> Future:
    experts, depth = shape.num_experts, shape.depth
    if moment.next_use is None:
        never = jnp.full((depth, experts), NEVER, jnp.int32)
        return Future(jnp.full(experts, NEVER, jnp.int32), jnp.zeros_like(never), never)
    layers = shape.num_layers
    steps = moment.next_use.reshape(2 * layers, experts)
    at = jnp.arange(2 * layers)[:, None] % layers
    events = jnp.where(steps < NEVER, steps * layers + at, NEVER).astype(jnp.int32)
    coming = layer + 1 + jnp.arange(depth)
    return Future(events[layer], rows[layers + coming], events[coming])


def _said(moment: Moment, layer, shape: CacheShape) -> Float[Array, "depth experts"]:
    if moment.lookahead is None:
        return jnp.zeros((shape.depth, shape.num_experts), jnp.float32)
    said = moment.lookahead[layer, : shape.depth].astype(jnp.float32) / 255
    return jnp.pad(said, ((0, shape.depth - len(said)), (0, 0)))
