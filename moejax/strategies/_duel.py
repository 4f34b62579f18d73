"""The switch of learned retention: two scorings compete in shadow caches, the better one rules."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax._types import PRNGKey
from moejax.strategies._base import Access, CacheShape, Decision, Strategy
from moejax.strategies._select import keep_best

_MEMORY_RATIO = 0.99
_MARGIN_RATIO = 0.99


class DuelState(NamedTuple):
    """Both strategies' states and what each would have missed.

    Attributes:
      challenger: State of the strategy on trial.
      champion: State of the strategy to beat.
      shadow: Experts each (challenger, champion) would hold in a cache of the same capacity.
      num_misses: Discounted misses of the two shadow caches.
    """

    challenger: Any
    champion: Any
    shadow: Bool[Array, "*layers 2 experts"]
    num_misses: Float[Array, "*layers 2"]


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
        layers, experts = shape.num_layers, shape.num_experts
        return DuelState(
            challenger.init(shape),
            champion.init(shape),
            jnp.zeros((layers, 2, experts), bool),
            jnp.zeros((layers, 2), jnp.float32),
        )

    def step(state: DuelState, access: Access, key: PRNGKey) -> tuple[DuelState, Decision]:
        demanded = access.demand > 0
        num_misses = (demanded[None] & ~state.shadow).sum(-1).astype(jnp.float32)
        num_misses = _MEMORY_RATIO * state.num_misses + num_misses
        challenger_state, tried = challenger.step(state.challenger, access, key)
        champion_state, proven = champion.step(state.champion, access, key)
        scores = jnp.stack(
            [tried.keep_score.astype(jnp.float32), proven.keep_score.astype(jnp.float32)]
        )
        capacity = jnp.broadcast_to(access.capacity, (2,))
        shadow = keep_best(scores, state.shadow | demanded[None], capacity)
        challenger_rules = num_misses[0] < _MARGIN_RATIO * num_misses[1]
        keep_score = jnp.where(challenger_rules, scores[0], scores[1])
        state = DuelState(challenger_state, champion_state, shadow, num_misses)
        return state, tried._replace(keep_score=keep_score)

    return Strategy(init, step, reads_cache=True, prefetches=challenger.prefetches)
