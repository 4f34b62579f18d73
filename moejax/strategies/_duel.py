"""The switch of learned retention: two scorings compete in shadow caches, the better one rules."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._select import keep_best

_MEMORY_RATIO = 0.99
_MARGIN_RATIO = 0.99


class Contender(NamedTuple):
    """One side of a duel.

    Attributes:
      inner: State of the strategy.
      shadow: Experts that it would hold in a cache of the same capacity.
      num_misses: Discounted misses of that cache.
    """

    inner: Any
    shadow: Bool[Array, "*layers experts"]
    num_misses: Float[Array, "*layers"]


class DuelState(NamedTuple):
    """The strategy on trial and the one to beat."""

    challenger: Contender
    champion: Contender


def duel(challenger: Strategy, champion: Strategy) -> Strategy:
    """Scores as the champion does until the challenger would have missed less.

    Each layer simulates both in shadow caches of its own capacity, fed by demand alone, and
    follows the one with fewer discounted misses, so a challenger whose lessons stop being true
    is switched off within about a hundred events.

    Args:
      challenger: A strategy on trial, such as learned retention.
      champion: The strategy that must not be worsened, such as `lru()`.

    Returns:
      A `Strategy`; it reads capacity.

    Reference:
      Qureshi et al., "Adaptive insertion policies for high performance caching", ISCA 2007
      (set dueling), with shadow tags instead of sampled sets.
    """

    def init(shape: CacheShape) -> DuelState:
        return DuelState(_enter(challenger, shape), _enter(champion, shape))

    def step(state: DuelState, access: Access, key: PRNGKey | None) -> tuple[DuelState, Decision]:
        trial, tried = _compete(challenger, state.challenger, access, key)
        best, proven = _compete(champion, state.champion, access, key)
        challenger_rules = trial.num_misses < _MARGIN_RATIO * best.num_misses
        keep_score = jnp.where(challenger_rules, tried.keep_score, proven.keep_score)
        return DuelState(trial, best), tried._replace(keep_score=keep_score)

    reads_future = challenger.reads_future or champion.reads_future
    return challenger._replace(init=init, step=step, reads_cache=True, reads_future=reads_future)


def _enter(strategy: Strategy, shape: CacheShape) -> Contender:
    layers, experts = shape.num_layers, shape.num_experts
    nothing = jnp.zeros((layers, experts), bool)
    return Contender(strategy.init(shape), nothing, jnp.zeros(layers, jnp.float32))


def _compete(
    strategy: Strategy, side: Contender, access: Access, key: PRNGKey | None
) -> tuple[Contender, Decision]:
    """One event in the shadow cache, and what the strategy says of it."""
    demanded = access.demand > 0
    num_misses = (demanded & ~side.shadow).sum().astype(jnp.float32)
    inner, decision = strategy.step(side.inner, access, key)
    score = decision.keep_score.astype(jnp.float32)
    shadow = keep_best(score, side.shadow | demanded, access.capacity)
    side = Contender(inner, shadow, _MEMORY_RATIO * side.num_misses + num_misses)
    return side, decision._replace(keep_score=score)
