"""Perfect knowledge of the future."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._select import first_rows, keep_best

# Farther than a copy takes anywhere; it need not be sure of what it knows.
_REACH = 8


class OracleState(NamedTuple):
    """An oracle has no past; one number a layer stands for its state."""

    nothing: Int[Array, "*layers"]


def oracle() -> Strategy:
    """Belady's rule, with prefetch as far as the link has time (the study's strategy B).

    It keeps what is needed soonest and names for prefetch exactly what the coming layers will
    demand, but never more than fits without evicting an expert that Belady's rule would keep
    past that demand: so prefetching hides fetches and adds none.

    Returns:
      A `Strategy` that reads `access.future`, which exists only in a replay.

    Reference:
      Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """

    def init(shape: CacheShape) -> OracleState:
        return OracleState(jnp.zeros(shape.num_layers, jnp.int32))

    def step(
        state: OracleState, access: Access, key: PRNGKey | None
    ) -> tuple[OracleState, Decision]:
        return state, Decision(
            keep_score=-access.future.next_use, prefetch_probability=_free_of_charge(access)
        )

    return Strategy(init, step, reads_future=True, reach=_REACH)


def _free_of_charge(access: Access) -> Float[Array, "ahead experts"]:
    """1 for each coming demand that may be prefetched without evicting what must stay."""
    demanded = first_rows(access.future.demand_ahead, _REACH) > 0
    resident = first_rows(access.resident_ahead, _REACH)
    capacity = first_rows(access.capacity_ahead, _REACH)
    next_use = first_rows(access.future.next_use_ahead, _REACH)
    kept = keep_best(-next_use, demanded | resident, capacity)
    must_stay = resident & (kept | demanded)
    num_open = capacity - must_stay.sum(-1)
    wanted: Bool[Array, "ahead experts"] = demanded & ~resident
    first = jnp.cumsum(wanted, axis=-1) <= num_open[:, None]
    return (wanted & first | demanded & resident).astype(jnp.float32)
