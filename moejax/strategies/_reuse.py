"""Learned retention: will this expert be used again before it would be evicted?

A linear score of a few features, the same code when it learns on a profile and when it runs.
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._profile import Profile

FEATURES = ("recency", "burst", "habit", "trend", "popularity", "succession")
_MEMORY_RATIOS = tuple(np.float32(ratio) for ratio in (0.7, 0.95, 0.99))

# Recency alone decides, so that an unlearned score is LRU.
LRU_WEIGHTS = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class ReuseWeights(NamedTuple):
    """Weights of the features, for several horizons.

    Attributes:
      horizon_steps: Horizons in ascending order: how soon is "again".
      weights: One row a horizon.
    """

    horizon_steps: Float[np.ndarray, " horizons"]
    weights: Float[np.ndarray, "horizons features"]


class ReuseState(NamedTuple):
    """What the features are made of.

    Attributes:
      last_use: Event of last demand; -1 means never.
      rates: Discounted use rates over a few, about twenty and about a hundred steps.
      num_uses: Uses so far, the profile's included.
      num_steps: Steps so far, the profile's included.
      num_pairs: Token-to-token transitions: expert i, then expert j one step later.
      demand_before: Demand one step ago.
      topk: Experts a token demands.
    """

    last_use: Int[Array, "*layers experts"]
    rates: tuple[Float[Array, "*layers experts"], ...]
    num_uses: Float[Array, "*layers experts"]
    num_steps: Float[Array, "*layers"]
    num_pairs: Float[Array, "*layers experts experts"]
    demand_before: Bool[Array, "*layers experts"]
    topk: Float[Array, "*layers"]


def reuse(
    profile: Profile | None,
    weights: ReuseWeights | Float[Array, " features"] | tuple[float, ...] = LRU_WEIGHTS,
    *,
    online: bool = True,
) -> Strategy:
    """Keeps the experts whose reuse is predicted soonest.

    Args:
      profile: Where popularity and transition counts start; None starts from nothing.
      weights: Weight of each of `FEATURES`, or weights by horizon. Of those, the horizon is taken
        that an expert has in a cache of this capacity: about capacity / topk steps. Weights that
        are a jax array may be traced, but do not run in a kernel.
      online: Whether events of the trace under test go on being counted.

    Returns:
      A `Strategy` whose `keep_score` is the weighted sum of the features.
    """

    def init(shape: CacheShape) -> ReuseState:
        layers, experts = shape.num_layers, shape.num_experts
        if profile is None:
            num_uses = jnp.zeros((layers, experts), jnp.float32)
            num_pairs = jnp.zeros((layers, experts, experts), jnp.float32)
            num_steps = 0.0
        else:
            num_uses = jnp.asarray(profile.num_uses, jnp.float32)
            num_pairs = jnp.asarray(profile.successor, jnp.float32)
            num_steps = float(profile.num_tokens)
        return ReuseState(
            last_use=jnp.full((layers, experts), -1, jnp.int32),
            rates=tuple(jnp.zeros((layers, experts), jnp.float32) for _ in _MEMORY_RATIOS),
            num_uses=num_uses,
            num_steps=jnp.full(layers, num_steps),
            num_pairs=num_pairs,
            demand_before=jnp.zeros((layers, experts), bool),
            topk=jnp.full(layers, float(shape.topk)),
        )

    def step(state: ReuseState, access: Access, key: PRNGKey | None) -> tuple[ReuseState, Decision]:
        state = observe(state, access.demand, access.event, online=online)
        mine = _weights_at(weights, access.capacity / state.topk)
        rows = features(state, access.event)
        score = mine[0] * rows[0]
        for weight, row in zip(mine[1:], rows[1:], strict=True):
            score = score + weight * row
        return state, Decision(score)

    return Strategy(init, step, reads_cache=isinstance(weights, ReuseWeights))


def observe(
    state: ReuseState,
    demand: Int[Array, " experts"],
    event: Int[Array, ""],
    *,
    online: bool = True,
) -> ReuseState:
    """Takes one event of one layer into the features' state."""
    demanded = demand > 0
    used = demanded.astype(jnp.float32)
    before = state.demand_before.astype(jnp.float32)
    state = state._replace(
        last_use=jnp.where(demanded, event, state.last_use),
        rates=tuple(
            memory * rate + (1 - memory) * used
            for memory, rate in zip(_MEMORY_RATIOS, state.rates, strict=True)
        ),
        demand_before=demanded,
    )
    if not online:
        return state
    return state._replace(
        num_uses=state.num_uses + used,
        num_steps=state.num_steps + 1,
        num_pairs=state.num_pairs + before[:, None] * used[None, :],
    )


def features(state: ReuseState, event: Int[Array, ""]) -> tuple[Float[Array, " experts"], ...]:
    """One row for each of `FEATURES`, each about one unit wide."""
    never = state.last_use < 0
    idle = jnp.where(never, 1e6, (event - state.last_use).astype(jnp.float32))
    popularity = (state.num_uses + 1.0) / (state.num_steps + 10.0)
    share = state.demand_before.astype(jnp.float32) / (state.num_uses + 1.0)
    succession = (share[:, None] * state.num_pairs).sum(0)
    return (
        -jnp.log1p(idle),
        *(jnp.log(rate + 0.02) for rate in state.rates),
        jnp.log(popularity),
        jnp.log(succession + 0.02),
    )


def _weights_at(weights, horizon_steps: Float[Array, ""]) -> list[Any]:
    """The weight of each feature, linear in the logarithm of the horizon between known ones."""
    if not isinstance(weights, ReuseWeights):
        return list(weights)
    known = np.log(np.asarray(weights.horizon_steps, np.float64)).tolist()
    wanted = jnp.log(jnp.maximum(horizon_steps, 1e-3))
    # How far the horizon is from each known one to the next: 0 before and 1 beyond.
    ramps = [jnp.clip((wanted - a) / (b - a), 0.0, 1.0) for a, b in itertools.pairwise(known)]
    table = np.asarray(weights.weights, np.float64)
    rises = np.diff(table, axis=0).tolist()
    return [
        first + sum(rise[feature] * ramp for rise, ramp in zip(rises, ramps, strict=True))
        for feature, first in enumerate(table[0].tolist())
    ]
