"""A trace as the simulators read it: demand step by step, and the future for the oracle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from moejax.strategies import NEVER, Access, CacheShape, Future
from moejax.trace import demand_counts, known_ids, next_use

MAX_DEPTH = 3


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
    named = known_ids(lookahead[:, :, :depth], num_experts).astype(np.intp)
    *lanes, places, width = named.shape
    said = np.zeros((*lanes, num_experts + 1), np.uint8)
    # Worst ranks first, so that the best one an expert gets is what stays.
    for rank in reversed(range(width)):
        for place in range(places):
            value = np.uint8(255 - 255 * rank // width)
            np.put_along_axis(said, named[..., place, rank, None], value, axis=-1)
    return said[..., :num_experts]


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
