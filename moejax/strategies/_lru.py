"""Recency."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy


class LruState(NamedTuple):
    """Event at which each expert was last demanded; -1 means never."""

    last_use: Int[Array, "*layers experts"]


def lru() -> Strategy:
    """Least recently used: evict the resident expert idle for longest.

    Returns:
      A `Strategy` whose `keep_score` is the event of last use.

    Reference:
      Mattson et al., "Evaluation techniques for storage hierarchies", 1970.
    """

    def init(shape: CacheShape) -> LruState:
        return LruState(jnp.full((shape.num_layers, shape.num_experts), -1, jnp.int32))

    def step(state: LruState, access: Access, key: PRNGKey | None) -> tuple[LruState, Decision]:
        last_use = jnp.where(access.demand > 0, access.event, state.last_use)
        return LruState(last_use), Decision(last_use)

    return Strategy(init, step)
