"""A trace as the simulators read it: demand step by step, and the future for the oracle."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from moejax.strategies import Access, CacheShape, Future
from moejax.trace import demand_counts, next_use

NEVER = 2**30
MAX_DEPTH = 3


class Replay(NamedTuple):
    """Batched routing, ready to be replayed.

    Attributes:
      demand: Tokens that demand each expert.
      next_use: Step of the next demand of each expert after this step, `NEVER` if none; None
        where no oracle looks.
      lookahead: Ids the gates of the next layers name, best first; None where unknown.
    """

    demand: Shaped[np.ndarray | Array, "*lanes steps layers experts"]
    next_use: Int[np.ndarray | Array, "*lanes steps layers experts"] | None = None
    lookahead: Shaped[np.ndarray | Array, "*lanes steps layers ahead width"] | None = None


def replay(
    experts: Shaped[np.ndarray, "steps layers width"],
    num_experts: int,
    *,
    with_future: bool = True,
    lookahead: Shaped[np.ndarray, "steps layers ahead width"] | None = None,
) -> Replay:
    """Prepares batched routing, as `batch_trace` gives it, for the simulators."""
    demand = demand_counts(experts, num_experts)
    coming = None
    if with_future:
        coming = next_use(demand)
        coming[coming == len(demand)] = NEVER
    return Replay(demand, coming, lookahead)


def cache_shape(demand: Shaped[Array, "steps layers experts"], topk: int) -> CacheShape:
    """The static sizes of a replay, with prefetch at most `MAX_DEPTH` layers ahead."""
    _, num_layers, num_experts = demand.shape
    return CacheShape(num_layers, num_experts, topk, min(MAX_DEPTH, num_layers - 1))


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
    lookahead: Shaped[Array, "layers ahead width"] | None


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
        lookahead=None if said is None else _rows(said, start, stop, np.iinfo(said.dtype).max),
    )


def _rows(table: Shaped[Array, "steps ..."], start: int, stop: int, filling: int) -> Array:
    """Rows `start` to `stop`, filled up where they lie outside the table."""
    inside = jnp.asarray(table[max(start, 0) : max(min(stop, len(table)), 0)])
    above, below = max(-start, 0), max(stop - max(len(table), start), 0)
    pads = [(above, below)] + [(0, 0)] * (inside.ndim - 1)
    return jnp.pad(inside, pads, constant_values=filling)


def access_at(
    moment: Moment,
    layer: Int[Array, ""],
    shape: CacheShape,
    resident: Shaped[Array, "layers experts"],
    capacity: Int[Array, "layers"],
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
    named = moment.lookahead[layer, : shape.depth]
    width = named.shape[-1]
    value = 1.0 - jnp.arange(width, dtype=jnp.float32) / width
    is_named = named[..., None] == jnp.arange(shape.num_experts, dtype=named.dtype)[None, None, :]
    return (is_named * value[None, :, None]).max(1)
