"""Frequency."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy


class LfuState(NamedTuple):
    """How often each expert was demanded."""

    num_uses: Int[Array, "*layers experts"]


def lfu() -> Strategy:
    """Least frequently used, with perfect counts: an evicted expert keeps its count.

    Returns:
      A `Strategy` whose `keep_score` is the count.

    Reference:
      Aho, Denning, Ullman, "Principles of optimal page replacement", 1971.
    """

    def init(shape: CacheShape) -> LfuState:
        return LfuState(jnp.zeros((shape.num_layers, shape.num_experts), jnp.int32))

    def step(state: LfuState, access: Access, key: PRNGKey | None) -> tuple[LfuState, Decision]:
        num_uses = state.num_uses + (access.demand > 0)
        return LfuState(num_uses), Decision(num_uses)

    return Strategy(init, step)
