"""Order of arrival."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy


class FifoState(NamedTuple):
    """Event at which each expert last entered the cache."""

    arrival: Int[Array, "*layers experts"]


def fifo() -> Strategy:
    """First in, first out: evict the resident expert that was loaded longest ago.

    Returns:
      A `Strategy` whose `keep_score` is the event of arrival; it reads residency.
    """

    def init(shape: CacheShape) -> FifoState:
        return FifoState(jnp.full((shape.num_layers, shape.num_experts), -1, jnp.int32))

    def step(state: FifoState, access: Access, key: PRNGKey | None) -> tuple[FifoState, Decision]:
        arrives = (access.demand > 0) & ~access.resident
        arrival = jnp.where(arrives, access.event, state.arrival)
        return FifoState(arrival), Decision(arrival)

    return Strategy(init, step, reads_cache=True)
