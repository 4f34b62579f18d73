"""Pinning by popularity."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._profile import Profile
from moejax.strategies._select import best_share


class TopKState(NamedTuple):
    """Popularity on the profile trace and the pins it gives."""

    num_uses: Float[Array, "*layers experts"]
    is_pin: Bool[Array, "*layers experts"]


def top_k(profile: Profile, share_ratio: float = 0.5) -> Strategy:
    """Pin the experts that a profile trace demanded most (the study's strategy D).

    Args:
      profile: Counts of a trace that is not the one under test.
      share_ratio: Share of a layer's experts that are pins; fewer when the slots are fewer.

    Returns:
      A `Strategy` that admits only its pins, each on its first demand.
    """

    def init(shape: CacheShape) -> TopKState:
        num_uses = jnp.asarray(profile.num_uses)
        return TopKState(num_uses, best_share(num_uses, share_ratio))

    def step(state: TopKState, access: Access, key: PRNGKey | None) -> tuple[TopKState, Decision]:
        return state, Decision(state.num_uses, admit=state.is_pin)

    return Strategy(init, step)
