"""First-in-first-out queues as arrays, and sets served one request at a time.

A queue of experts is an array of places: 1 is the front, which leaves first, 0 is outside. That
takes no sorting and no indexing, so it runs in a kernel, and an expert that does not exist is
outside for ever. One expert is a mask with a single true element, none at all is an empty mask.
"""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Queue: TypeAlias = Int[Array, "*layers experts"]
State = TypeVar("State")

_BEHIND_ALL = 2**30


def empty_queue(num_layers: int, num_experts: int) -> Queue:
    """A queue a layer, with nobody in it."""
    return jnp.zeros((num_layers, num_experts), jnp.int32)


def some(mask: Bool[Array, " experts"]) -> Bool[Array, ""]:
    """Whether anyone is meant; a kernel knows sums, but no `any`."""
    return mask.sum(dtype=jnp.int32) > 0


def length(queue: Int[Array, " experts"]) -> Int[Array, ""]:
    """How many are in the queue."""
    return (queue > 0).sum(dtype=jnp.int32)


def front(queue: Int[Array, " experts"]) -> Bool[Array, " experts"]:
    """Who leaves first."""
    return queue == 1


def joined(queue: Int[Array, " experts"], one: Bool[Array, " experts"]) -> Int[Array, " experts"]:
    """The queue with one more at its back."""
    return jnp.where(one, length(queue) + 1, queue)


def left(queue: Int[Array, " experts"], one: Bool[Array, " experts"]) -> Int[Array, " experts"]:
    """The queue without one; the queue itself where that one is not in it."""
    place = jnp.where(one & (queue > 0), queue, _BEHIND_ALL).min()
    return jnp.where(queue == place, 0, queue - (queue > place))


def serve_one_by_one(
    state: State,
    demand: Int[Array, " experts"],
    is_inside: Bool[Array, " experts"],
    request: Callable[[State, Bool[Array, " experts"]], State],
) -> State:
    """Requests the experts of a set one after another: first who is inside, then the others.

    So a set that is resident is used before anything is evicted for the rest of it, and sets of
    one are what a cache of single requests sees.

    Args:
      state: What `request` works on.
      demand: The set: whoever is demanded at all.
      is_inside: Who is in the cache before the event.
      request: Serves one expert.
    """
    hit, miss = (demand > 0) & is_inside, (demand > 0) & ~is_inside
    num_hits, num_misses = hit.sum(dtype=jnp.int32), miss.sum(dtype=jnp.int32)
    hit_turn = jnp.cumsum(hit.astype(jnp.int32))
    miss_turn = num_hits + jnp.cumsum(miss.astype(jnp.int32))

    def serve(turn, state):
        return request(state, hit & (hit_turn == turn) | miss & (miss_turn == turn))

    return jax.lax.fori_loop(1, num_hits + num_misses + 1, serve, state)
