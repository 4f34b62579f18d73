"""Wrappers: a strategy goes in, a strategy comes out."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Real

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._predict import Predictor
from moejax.strategies._profile import Profile
from moejax.strategies._select import best_share, rank_by_score


class PrefetchState(NamedTuple):
    """State of the wrapped strategy and of the predictor."""

    inner: Any
    predictor: Any


def with_prefetch(strategy: Strategy, predictor: Predictor) -> Strategy:
    """Adds a predictor's prefetches to any strategy's retention."""

    def init(shape: CacheShape) -> PrefetchState:
        return PrefetchState(strategy.init(shape), predictor.init(shape))

    def step(
        state: PrefetchState, access: Access, key: PRNGKey | None
    ) -> tuple[PrefetchState, Decision]:
        inner, decision = strategy.step(state.inner, access, key)
        predicted, probability = predictor.step(state.predictor, access)
        state = PrefetchState(inner, predicted)
        return state, decision._replace(prefetch_probability=probability)

    return strategy._replace(
        init=init,
        step=step,
        reach=predictor.reach,
        reads_gates=strategy.reads_gates or predictor.reads_gates,
    )


def within_reach(strategy: Strategy, depth: Int[Array, ""] | int) -> Strategy:
    """Lets a strategy prefetch at most `depth` layers ahead; a number, so it may be mapped over."""

    def step(state: Any, access: Access, key: PRNGKey | None) -> tuple[Any, Decision]:
        state, decision = strategy.step(state, access, key)
        probability = decision.prefetch_probability
        if probability is not None:
            is_near = jnp.arange(len(probability))[:, None] < depth
            decision = decision._replace(
                prefetch_probability=jnp.where(is_near, probability, jnp.zeros_like(probability))
            )
        return state, decision

    return strategy._replace(step=step)


class PinnedState(NamedTuple):
    """State of the wrapped strategy and the profile's hottest experts."""

    inner: Any
    is_pin: Bool[Array, "*layers experts"]


def pinned(strategy: Strategy, profile: Profile, share_ratio: float) -> Strategy:
    """Keeps the profile's hottest experts for good and leaves the other slots to a strategy.

    Args:
      strategy: What rules the other slots.
      profile: Counts of a trace that is not the one under test.
      share_ratio: Share of a layer's experts that are pins. Where the slots are fewer, the
        strategy's own scores decide among the pins.
    """

    def init(shape: CacheShape) -> PinnedState:
        is_pin = best_share(jnp.asarray(profile.num_uses), share_ratio)
        return PinnedState(strategy.init(shape), is_pin)

    def step(
        state: PinnedState, access: Access, key: PRNGKey | None
    ) -> tuple[PinnedState, Decision]:
        inner, decision = strategy.step(state.inner, access, key)
        admit = decision.admit if decision.admit is None else decision.admit | state.is_pin
        decision = decision._replace(
            keep_score=_with_first(decision.keep_score, state.is_pin), admit=admit
        )
        return state._replace(inner=inner), decision

    return strategy._replace(init=init, step=step)


def always_admit(strategy: Strategy) -> Strategy:
    """Lets a demanded expert always enter the cache, as classic demand caches do.

    Without it an expert that is not worth keeping streams past. With it and one request an event,
    `lru` and `oracle` count what libCacheSim's LRU and Belady count.
    """

    def step(state: Any, access: Access, key: PRNGKey | None) -> tuple[Any, Decision]:
        state, decision = strategy.step(state, access, key)
        score = _with_first(decision.keep_score, access.demand > 0)
        return state, decision._replace(keep_score=score, admit=None)

    return strategy._replace(step=step)


def host_compute(strategy: Strategy) -> Strategy:
    """Lets a miss be computed on the host where that is cheaper than copying the expert.

    The simulator and the engine compare the two prices of the cost model; an expert computed on
    the host is a miss that moves no bytes and enters no slot.
    """
    return strategy._replace(computes_on_host=True)


def _with_first(
    score: Real[Array, " experts"], chosen: Bool[Array, " experts"]
) -> Int[Array, " experts"]:
    """Scores in the same order, but with the chosen experts before all others."""
    return jnp.where(chosen, len(score), 0) - rank_by_score(score)
