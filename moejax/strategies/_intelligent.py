"""Adaptive learning with transition modelling."""

from jaxtyping import Array, Float

from moejax.strategies._base import Strategy
from moejax.strategies._duel import duel
from moejax.strategies._lru import lru
from moejax.strategies._predict import calibrated, transitions
from moejax.strategies._profile import Profile
from moejax.strategies._reuse import ReuseWeights, reuse
from moejax.strategies._wrap import with_prefetch

# Chosen by hand and better than lru on every listed trace; used where no profile teaches more.
DEFAULT_WEIGHTS = (0.3, 0.2, 0.3, 0.6, 0.4, 0.5)


def intelligent(
    profile: Profile | None = None,
    weights: ReuseWeights | Float[Array, " features"] | tuple[float, ...] | None = None,
) -> Strategy:
    """Keeps and prefetches by predicted reuse, learned online (the study's strategy E).

    Recency, frequency at three time scales, popularity and token-to-token transitions are
    combined by weights learned on a profile; transition counts to the layers below are updated
    at every event and name prefetches. Both switch themselves off where they do not pay: see
    `duel` and `calibrated`.

    Args:
      profile: Where the counts start; None starts from nothing.
      weights: Weights of the features; None takes the profile's, or else the defaults.
    """
    if weights is None and profile is not None:
        weights = profile.reuse_weights
    if weights is None:
        weights = DEFAULT_WEIGHTS
    retention = duel(reuse(profile, weights), lru())
    return with_prefetch(retention, calibrated(transitions(profile, online=True, reach=1)))
