"""Three static queues."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

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

_SMALL_PERCENT = 10
_GHOST_PERCENT = 90
_MOST_USES = 3
_USES_TO_STAY = 2


class S3FifoState(NamedTuple):
    """Three queues, and how often residents were used.

    Attributes:
      small: Probation of experts that are new.
      main: Experts that proved themselves.
      ghost: Experts that lately failed the probation; they are not resident.
      num_uses: Uses since arrival, up to 3; the hand of `main` takes one away as it passes.
      has_evicted: Whether the cache has filled up once.
    """

    small: Queue
    main: Queue
    ghost: Queue
    num_uses: Int[Array, "*layers experts"]
    has_evicted: Bool[Array, "*layers"]


def s3fifo() -> Strategy:
    """S3-FIFO: a small queue on probation, a main queue with second chances, a ghost queue.

    The small queue has a tenth of the slots, but at least one; two uses there lead to the main
    queue. While the cache fills, the main queue takes what the small one has no place for. The
    experts of a set are requested one after another, hits first.

    Returns:
      A `Strategy` of one layer's slots; it reads capacity.

    Reference:
      Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.
    """

    def init(shape: CacheShape) -> S3FifoState:
        queue = empty_queue(shape.num_layers, shape.num_experts)
        return S3FifoState(queue, queue, queue, queue, jnp.zeros(shape.num_layers, bool))

    return cache_of_requests(init, _is_inside, _request)


def _is_inside(state: S3FifoState) -> Bool[Array, " experts"]:
    return (state.small > 0) | (state.main > 0)


def _request(
    state: S3FifoState, one: Bool[Array, " experts"], capacity: Int[Array, ""]
) -> S3FifoState:
    is_new = one & ~_is_inside(state)
    is_ghost = is_new & (state.ghost > 0)
    num_uses = jnp.where(one, jnp.minimum(state.num_uses + 1, _MOST_USES), state.num_uses)
    state = state._replace(num_uses=num_uses, ghost=left(state.ghost, is_ghost))
    must_evict = some(is_new) & (length(state.small) + length(state.main) >= capacity)
    state = _where(must_evict, _evict(state, capacity), state)
    fills_up = ~state.has_evicted & (length(state.small) >= _small_slots(capacity))
    joins_main = some(is_ghost) | fills_up
    return state._replace(
        small=joined(state.small, is_new & ~joins_main),
        main=joined(state.main, is_new & joins_main),
        num_uses=jnp.where(is_new, 0, state.num_uses),
    )


def _evict(state: S3FifoState, capacity: Int[Array, ""]) -> S3FifoState:
    """One eviction: from probation, or from the main queue where that is too long."""
    main_first = length(state.main) > capacity - _small_slots(capacity)
    state = state._replace(has_evicted=jnp.ones_like(state.has_evicted))
    proved = _where(main_first, state, _end_probation(state, capacity))
    num_before = length(state.small) + length(state.main)
    is_done = length(proved.small) + length(proved.main) < num_before
    return _where(is_done, proved, _evict_from_main(proved))


def _end_probation(state: S3FifoState, capacity: Int[Array, ""]) -> S3FifoState:
    """Moves proven experts to the main queue up to the first that is not, which is evicted."""
    small, num_small = state.small, length(state.small)
    fails = (small > 0) & (state.num_uses < _USES_TO_STAY)
    first = jnp.where(fails, small, num_small + 1).min()
    proven = (small > 0) & (small < first)
    num_ghosts = _GHOST_PERCENT * capacity // 100
    ghost = state.ghost
    ghost = jnp.where(length(ghost) >= num_ghosts, left(ghost, front(ghost)), ghost)
    ghost = joined(ghost, fails & (small == first) & (num_ghosts > 0))
    return state._replace(
        small=jnp.maximum(small - first, 0),
        main=jnp.where(proven, length(state.main) + small, state.main),
        ghost=jnp.where(some(fails), ghost, state.ghost),
        num_uses=jnp.where(proven, 0, state.num_uses),
    )


def _evict_from_main(state: S3FifoState) -> S3FifoState:
    """Evicts the first whose uses run out; each that is passed pays one and goes to the back."""
    main, num_main = state.main, length(state.main)
    is_main = main > 0
    # Nobody leaves for as many rounds as the least used expert has uses.
    num_rounds = jnp.where(is_main, state.num_uses, _MOST_USES).min()
    first = jnp.where(is_main & (state.num_uses == num_rounds), main, num_main + 1).min()
    is_passed = is_main & (main < first)
    main = jnp.where(is_passed, main + num_main - first, jnp.maximum(main - first, 0))
    return state._replace(
        main=main, num_uses=state.num_uses - is_main * num_rounds - is_passed.astype(jnp.int32)
    )


def _small_slots(capacity: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.maximum(_SMALL_PERCENT * capacity // 100, 1)


def _where(condition: Bool[Array, ""], new: S3FifoState, old: S3FifoState) -> S3FifoState:
    return S3FifoState(*(jnp.where(condition, a, b) for a, b in zip(new, old, strict=True)))
