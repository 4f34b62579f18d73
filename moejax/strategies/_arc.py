"""Recency against frequency, balanced by what either lost."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.strategies._base import CacheShape, Strategy
from moejax.strategies._queue import (
    Queue,
    cache_of_requests,
    empty_queue,
    front,
    joined,
    left,
    length,
    some,
)

# Rounding of thirds and the like; the paper's target is a sum of fractions.
_ROUNDING = 1e-3


class ArcState(NamedTuple):
    """Four lists, each from least to most recently used; names as in the paper.

    Attributes:
      t1: Residents used once lately.
      t2: Residents used at least twice lately.
      b1: Experts evicted from `t1` lately.
      b2: Experts evicted from `t2` lately.
      target: Slots that `t1` should have, the paper's p.
    """

    t1: Queue
    t2: Queue
    b1: Queue
    b2: Queue
    target: Float[Array, "*layers"]


def arc() -> Strategy:
    """ARC: two recency lists, of experts used once and more often, sized by their ghosts' hits.

    The experts of a set are requested one after another, hits first. With one expert an event
    the hits are those of the published algorithm, its target an exact sum of fractions.

    Returns:
      A `Strategy` of one layer's slots; it reads capacity.

    Reference:
      Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4.
    """

    def init(shape: CacheShape) -> ArcState:
        queue = empty_queue(shape.num_layers, shape.num_experts)
        return ArcState(queue, queue, queue, queue, jnp.zeros(shape.num_layers, jnp.float32))

    return cache_of_requests(init, _is_inside, _request)


def _is_inside(state: ArcState) -> Bool[Array, " experts"]:
    return (state.t1 > 0) | (state.t2 > 0)


def _request(state: ArcState, one: Bool[Array, " experts"], capacity: Int[Array, ""]) -> ArcState:
    in_b1, in_b2 = some(one & (state.b1 > 0)), some(one & (state.b2 > 0))
    is_hit = some(one & _is_inside(state))
    is_fresh = some(one) & ~(is_hit | in_b1 | in_b2)
    state = state._replace(target=_target(state, in_b1, in_b2, capacity))
    t1, t2, b1, b2 = (left(queue, one) for queue in state[:4])
    state = ArcState(t1, t2, b1, b2, state.target)
    is_full = length(state.t1) + length(state.t2) >= capacity
    state, drops_only = _trimmed(state, is_fresh & is_full, capacity)
    state = _replaced(state, in_b1 | in_b2 | is_fresh & is_full & ~drops_only, in_b2)
    return state._replace(t1=joined(state.t1, one & is_fresh), t2=joined(state.t2, one & ~is_fresh))


def _target(state: ArcState, in_b1, in_b2, capacity: Int[Array, ""]) -> Float[Array, ""]:
    """A hit of a ghost makes its list's share grow, the more the fewer ghosts that list has."""
    num_b1 = length(state.b1).astype(jnp.float32)
    num_b2 = length(state.b2).astype(jnp.float32)
    grown = state.target + jnp.maximum(num_b2 / jnp.maximum(num_b1, 1), 1)
    shrunk = state.target - jnp.maximum(num_b1 / jnp.maximum(num_b2, 1), 1)
    grown = jnp.minimum(grown, capacity.astype(jnp.float32))
    target = jnp.where(in_b1, grown, jnp.where(in_b2, jnp.maximum(shrunk, 0), state.target))
    whole = jnp.floor(target + 0.5)
    return jnp.where(jnp.abs(target - whole) < _ROUNDING, whole, target)


def _trimmed(
    state: ArcState, must_trim: Bool[Array, ""], capacity: Int[Array, ""]
) -> tuple[ArcState, Bool[Array, ""]]:
    """Keeps the lists within their sum; also says whether a resident left without a ghost."""
    num_first = length(state.t1) + length(state.b1)
    num_all = num_first + length(state.t2) + length(state.b2)
    first_is_full = must_trim & (num_first >= capacity)
    drops_only = first_is_full & ~some(state.b1 > 0)
    all_is_full = must_trim & (num_first < capacity) & (num_all >= 2 * capacity)
    trimmed = state._replace(
        t1=left(state.t1, front(state.t1) & drops_only),
        b1=left(state.b1, front(state.b1) & first_is_full),
        b2=left(state.b2, front(state.b2) & all_is_full),
    )
    return trimmed, drops_only


def _replaced(state: ArcState, must_evict: Bool[Array, ""], in_b2: Bool[Array, ""]) -> ArcState:
    """The paper's REPLACE: the least recent of `t1` or `t2` becomes a ghost."""
    num_t1 = length(state.t1)
    is_over = (num_t1 > state.target) | (num_t1 == state.target) & in_b2
    from_t1 = must_evict & (num_t1 > 0) & is_over
    t1, t2 = front(state.t1) & from_t1, front(state.t2) & must_evict & ~from_t1
    return state._replace(
        t1=left(state.t1, t1),
        b1=joined(state.b1, t1),
        t2=left(state.t2, t2),
        b2=joined(state.b2, t2),
    )
