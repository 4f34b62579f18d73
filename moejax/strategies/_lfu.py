"""Frequency."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy


class LfuState(NamedTuple):
    """How often, and at which event last, each expert was demanded."""

    num_uses: Float[Array, "*layers experts"]
    last_use: Int[Array, "*layers experts"]


def lfu() -> Strategy:
    """Least frequently used, with perfect counts: an evicted expert keeps its count.

    Returns:
      A `Strategy` whose `keep_score` is the count plus `0.5 / (1 + idle events)`, a fraction that
      puts the more recent first among equals, as far as 32 bits can tell: of two experts used
      thousands of times, long idle both, the lower index comes first.

    Reference:
      Aho, Denning, Ullman, "Principles of optimal page replacement", 1971.
    """

    def init(shape: CacheShape) -> LfuState:
        lanes = (shape.num_layers, shape.num_experts)
        return LfuState(jnp.zeros(lanes, jnp.float32), jnp.full(lanes, -1, jnp.int32))

    def step(state: LfuState, access: Access, key: PRNGKey) -> tuple[LfuState, Decision]:
        demanded = access.demand > 0
        num_uses = state.num_uses + demanded
        last_use = jnp.where(demanded, access.event, state.last_use)
        # Half a use at most, so that a tie-break never outweighs a count.
        recency = 0.5 / (1 + access.event - last_use).astype(jnp.float32)
        return LfuState(num_uses, last_use), Decision(num_uses + recency)

    return Strategy(init, step)
