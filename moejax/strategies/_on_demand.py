"""No cache at all."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy


class OnDemandState(NamedTuple):
    """Nothing is remembered; the mask of no admissions is all there is."""

    admit: Bool[Array, "*layers experts"]


def on_demand() -> Strategy:
    """Fetch what a layer demands and drop it after that layer (the study's strategy A).

    Returns:
      A `Strategy` that admits nothing: every demand is a miss.
    """

    def init(shape: CacheShape) -> OnDemandState:
        return OnDemandState(jnp.zeros((shape.num_layers, shape.num_experts), bool))

    def step(
        state: OnDemandState, access: Access, key: PRNGKey | None
    ) -> tuple[OnDemandState, Decision]:
        return state, Decision(jnp.zeros_like(access.demand), admit=state.admit)

    return Strategy(init, step)
