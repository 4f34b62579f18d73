"""Staleness by forward pass."""

import jax.numpy as jnp

from moejax._types import PRNGKey
from moejax.strategies._base import NEVER, Access, CacheShape, Decision, Strategy
from moejax.strategies._fifo import FifoState, fifo


def least_stale() -> Strategy:
    """Least-Stale: evict what the current forward pass has not used, in order of arrival.

    An expert that this pass demands is current, every other is stale. Stale experts leave before
    current ones, and among equals the one that was loaded first leaves first. This is our reading
    of the idea for caches that belong to one layer, made from the paper's abstract; its own rule
    may differ, and its figures are not to be expected here.

    Returns:
      A `Strategy` of one layer's slots; it reads residency.

    Reference:
      Hoang et al., "SpecMD: a comprehensive study on speculative expert prefetching", 2026,
      arXiv:2602.03921.
    """
    by_arrival = fifo()

    def step(state: FifoState, access: Access, key: PRNGKey | None) -> tuple[FifoState, Decision]:
        state, decision = by_arrival.step(state, access, key)
        score = decision.keep_score
        return state, Decision(jnp.where(access.demand > 0, score, score - NEVER))

    def init(shape: CacheShape) -> FifoState:
        return by_arrival.init(shape)

    return Strategy(init, step, reads_cache=True, keeps_layers_apart=True)
