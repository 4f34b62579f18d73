"""Lazy promotion and quick demotion with one bit an expert."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.strategies._base import CacheShape, Strategy
from moejax.strategies._queue import (
    Queue,
    cache_of_requests,
    empty_queue,
    joined,
    left,
    length,
    some,
)


class SieveState(NamedTuple):
    """The queue in order of arrival.

    Attributes:
      queue: Place of each resident expert, the oldest first.
      is_visited: Whether it was used since it arrived or since the hand passed it.
      hand: Place where the search for a victim goes on; 0 and 1 are the oldest.
    """

    queue: Queue
    is_visited: Bool[Array, "*layers experts"]
    hand: Int[Array, "*layers"]


def sieve() -> Strategy:
    """SIEVE: a hand walks from old to new, spares who was visited once, and evicts who was not.

    The experts of a set are requested one after another, hits first. With one expert an event
    the hits are those of the published algorithm.

    Returns:
      A `Strategy` of one layer's slots; it reads capacity.

    Reference:
      Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web
      caches", NSDI 2024, algorithm 1.
    """

    def init(shape: CacheShape) -> SieveState:
        queue = empty_queue(shape.num_layers, shape.num_experts)
        return SieveState(queue, queue > 0, jnp.zeros(shape.num_layers, jnp.int32))

    return cache_of_requests(init, _is_inside, _request)


def _is_inside(state: SieveState) -> Bool[Array, " experts"]:
    return state.queue > 0


def _request(
    state: SieveState, one: Bool[Array, " experts"], capacity: Int[Array, ""]
) -> SieveState:
    is_new = one & (state.queue == 0)
    must_evict = some(is_new) & (length(state.queue) >= capacity)
    state = state._replace(is_visited=state.is_visited | one & ~is_new)
    swept = _evict(state)
    queue, is_visited, hand = (
        jnp.where(must_evict, new, old) for new, old in zip(swept, state, strict=True)
    )
    return SieveState(joined(queue, is_new), is_visited, hand)


def _evict(state: SieveState) -> SieveState:
    """One eviction; who is passed on the way loses the visit."""
    queue, is_visited, hand = state
    num_members = length(queue)
    is_member = queue > 0
    # In the order of the hand's walk, which goes on from the newest to the oldest.
    turn = jnp.where(queue >= hand, queue, queue + num_members)
    is_unvisited = is_member & ~is_visited
    # After a whole round all visits are gone, and the hand is where it began.
    candidates = jnp.where(some(is_unvisited), is_unvisited, is_member)
    first = jnp.where(candidates, turn, 2 * num_members + 1).min()
    victim = is_member & (turn == first)
    is_passed = jnp.where(some(is_unvisited), turn < first, is_member)
    place = jnp.where(victim, queue, 0).max()
    return SieveState(
        left(queue, victim),
        is_visited & ~is_passed & ~victim,
        jnp.where(place == num_members, 0, place),
    )
