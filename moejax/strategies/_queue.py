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

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy

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


def cache_of_requests(
    init: Callable[[CacheShape], State],
    is_inside: Callable[[State], Bool[Array, " experts"]],
    request: Callable[[State, Bool[Array, " experts"], Int[Array, ""]], State],
) -> Strategy:
    """A strategy for one layer's slots out of a cache that is asked for one expert at a time.

    The experts of a set are requested one after another, first who is inside, then the others, by
    id. So a set that is resident is used before anything is evicted for the rest of it, and sets
    of one are what the cache of single requests sees.

    Args:
      init: Builds the cache of every layer, with nobody inside.
      is_inside: Who is in the cache.
      request: Serves one expert, given the capacity.
    """

    def step(state: State, access: Access, key: PRNGKey | None) -> tuple[State, Decision]:
        demanded, inside = access.demand > 0, is_inside(state)
        turn = _turns(demanded & inside, demanded & ~inside)

        def serve(now: Int[Array, ""], state: State) -> State:
            return request(state, turn == now, access.capacity)

        num_turns = demanded.sum(dtype=jnp.int32)
        state = jax.lax.fori_loop(1, num_turns + 1, serve, state)
        return state, Decision(is_inside(state).astype(jnp.int32))

    return Strategy(init, step, reads_cache=True, keeps_layers_apart=True)


def _turns(first: Bool[Array, " experts"], then: Bool[Array, " experts"]) -> Int[Array, " experts"]:
    """When each is served, from 1 on; 0 is never."""
    first_turn = jnp.cumsum(first.astype(jnp.int32))
    then_turn = first.sum(dtype=jnp.int32) + jnp.cumsum(then.astype(jnp.int32))
    return jnp.where(first, first_turn, jnp.where(then, then_turn, 0))
