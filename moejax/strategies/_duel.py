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

    def step(state: DuelState, access: Access, key: PRNGKey | None) -> tuple[DuelState, Decision]:
        demanded = (access.demand > 0)[None, :]
        num_misses = (demanded & ~state.shadow).sum(-1).astype(jnp.float32)
        num_misses = _MEMORY_RATIO * state.num_misses + num_misses
        challenger_state, tried = challenger.step(state.challenger, access, key)
        champion_state, proven = champion.step(state.champion, access, key)
        trial, proof = (one.keep_score.astype(jnp.float32) for one in (tried, proven))
        # A kernel joins along a new last axis only; apart, the shadows take twice the time on CPU.
        scores = jnp.stack([trial, proof], axis=-1).T
        capacity = jnp.broadcast_to(access.capacity, (2,))
        shadow = keep_best(scores, state.shadow | demanded, capacity)
        is_challenger = jnp.arange(2) == 0
        num_tried = jnp.where(is_challenger, num_misses, 0.0).sum()
        num_proven = jnp.where(is_challenger, 0.0, num_misses).sum()
        keep_score = jnp.where(num_tried < _MARGIN_RATIO * num_proven, trial, proof)
        state = DuelState(challenger_state, champion_state, shadow, num_misses)
        return state, tried._replace(keep_score=keep_score)

    reads_future = challenger.reads_future or champion.reads_future
    return challenger._replace(init=init, step=step, reads_cache=True, reads_future=reads_future)
