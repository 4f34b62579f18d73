"""Learned retention: will this expert be used again before it would be evicted?

A linear score of a few features, the same code when it learns on a profile and when it runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._profile import Profile
from moejax.trace import Trace, demand_counts

FEATURES = ("recency", "burst", "habit", "trend", "popularity", "succession")
_MEMORY_RATIOS = (0.7, 0.95, 0.99)
_MAX_STEPS = 1024

# Recency alone decides, so that an unlearned score is LRU.
LRU_WEIGHTS = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class ReuseState(NamedTuple):
    """What the features are made of.

    Attributes:
      last_use: Event of last demand; -1 means never.
      rates: Discounted use rates over a few, about twenty and about a hundred steps.
      num_uses: Uses so far, the profile's included.
      num_steps: Steps so far, the profile's included.
      num_pairs: Token-to-token transitions: expert i, then expert j one step later.
      demand_before: Demand one step ago.
    """

    last_use: Int[Array, "*layers experts"]
    rates: Float[Array, "*layers 3 experts"]
    num_uses: Float[Array, "*layers experts"]
    num_steps: Float[Array, "*layers"]
    num_pairs: Float[Array, "*layers experts experts"]
    demand_before: Bool[Array, "*layers experts"]


def reuse(
    profile: Profile | None,
    weights: Float[Array, " features"] | tuple[float, ...] = LRU_WEIGHTS,
    *,
    online: bool = True,
) -> Strategy:
    """Keeps the experts whose reuse is predicted soonest.

    Args:
      profile: Where popularity and transition counts start; None starts from nothing.
      weights: Weight of each of `FEATURES`; `learn_reuse_weights` finds them.
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
            rates=jnp.zeros((layers, len(_MEMORY_RATIOS), experts), jnp.float32),
            num_uses=num_uses,
            num_steps=jnp.full(layers, num_steps),
            num_pairs=num_pairs,
            demand_before=jnp.zeros((layers, experts), bool),
        )

    def step(state: ReuseState, access: Access, key: PRNGKey) -> tuple[ReuseState, Decision]:
        state = _observe(state, access, online)
        return state, Decision(jnp.asarray(weights, jnp.float32) @ _features(state, access.event))

    return Strategy(init, step)


def learn_reuse_weights(
    trace: Trace, *, horizon_steps: int | None = None
) -> Float[np.ndarray, " features"]:
    """Fits the feature weights by logistic regression on a profile trace.

    The label of (step, layer, expert) is whether the expert is demanded again within
    `horizon_steps`: about the time a resident expert has before it would be evicted.

    Args:
      trace: Profile trace; its first 1,024 tokens are used.
      horizon_steps: Defaults to experts / topk, the mean time between uses of an expert.

    Returns:
      One weight a feature.
    """
    experts = trace.experts[:_MAX_STEPS]
    demand = demand_counts(experts, trace.num_experts)
    horizon = horizon_steps or max(1, trace.num_experts // trace.topk)
    if len(demand) <= 2 * horizon:
        return np.asarray(LRU_WEIGHTS, np.float32)
    used = np.cumsum(np.pad(demand > 0, ((1, 0), (0, 0), (0, 0))), axis=0, dtype=np.int32)
    label = used[1 + horizon :] > used[1:-horizon]
    shape = CacheShape(trace.num_layers, trace.num_experts, trace.topk, 0)
    # Counts that hold the answers would teach the fit to trust them too much: start from none.
    return np.asarray(_fit(jnp.asarray(demand), jnp.asarray(label), shape))


def _observe(state: ReuseState, access: "Access | _DemandOnly", online: bool) -> ReuseState:
    demanded = access.demand > 0
    used = demanded.astype(jnp.float32)
    memory = jnp.asarray(_MEMORY_RATIOS, jnp.float32)[:, None]
    rates = memory * state.rates + (1 - memory) * used[None, :]
    before = state.demand_before.astype(jnp.float32)
    state = state._replace(
        last_use=jnp.where(demanded, access.event, state.last_use),
        rates=rates,
        demand_before=demanded,
    )
    if not online:
        return state
    return state._replace(
        num_uses=state.num_uses + used,
        num_steps=state.num_steps + 1,
        num_pairs=state.num_pairs + before[:, None] * used[None, :],
    )


def _features(state: ReuseState, event: Int[Array, ""]) -> Float[Array, "features experts"]:
    """Rows as named in `FEATURES`, each about one unit wide."""
    never = state.last_use < 0
    idle = jnp.where(never, 1e6, (event - state.last_use).astype(jnp.float32))
    popularity = (state.num_uses + 1.0) / (state.num_steps + 10.0)
    share = state.demand_before / (state.num_uses + 1.0)
    succession = share @ state.num_pairs
    return jnp.concatenate(
        [
            -jnp.log1p(idle)[None, :],
            jnp.log(state.rates + 0.02),
            jnp.log(popularity)[None, :],
            jnp.log(succession + 0.02)[None, :],
        ]
    )


def _fit(demand, label, shape: CacheShape) -> Float[Array, " features"]:
    num_steps = len(label)
    start = reuse(None).init(shape)

    @jax.jit
    def fit(demand, label):
        def walk(state, step_demand):
            step, row = step_demand
            events = step * shape.num_layers + jnp.arange(shape.num_layers)

            def one(state, row, event):
                state = _observe(state, _DemandOnly(event, row), True)
                return state, _features(state, event)

            return jax.vmap(one)(state, row, events)

        steps = jnp.arange(num_steps)
        _, features = jax.lax.scan(walk, start, (steps, demand[:num_steps].astype(jnp.int32)))
        rows = features.transpose(0, 1, 3, 2).reshape(-1, len(FEATURES))
        target = label.reshape(-1).astype(jnp.float32)
        mean, spread = rows.mean(0), rows.std(0) + 1e-3
        rows = (rows - mean[None, :]) / spread[None, :]

        def loss(parameters):
            logits = rows @ parameters[:-1] + parameters[-1]
            penalty = 1e-4 * jnp.sum(parameters[:-1] ** 2)
            return optax.sigmoid_binary_cross_entropy(logits, target).mean() + penalty

        optimiser = optax.adam(0.1)
        parameters = jnp.zeros(len(FEATURES) + 1)

        def descend(carry, _):
            parameters, memory = carry
            updates, memory = optimiser.update(jax.grad(loss)(parameters), memory)
            return (optax.apply_updates(parameters, updates), memory), None

        carry = (parameters, optimiser.init(parameters))
        (parameters, _), _ = jax.lax.scan(descend, carry, None, length=100)
        return parameters[:-1] / spread

    return fit(demand, label)


class _DemandOnly(NamedTuple):
    """The part of an `Access` that the features read."""

    event: Int[Array, ""]
    demand: Int[Array, " experts"]
