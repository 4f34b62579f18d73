"""Several layers ahead by learned patterns."""

from moejax.strategies._base import Strategy
from moejax.strategies._duel import duel
from moejax.strategies._lru import lru
from moejax.strategies._predict import calibrated, transitions
from moejax.strategies._profile import Profile
from moejax.strategies._reuse import reuse
from moejax.strategies._wrap import with_prefetch

# Recency, corrected by the popularity and the token-to-token pattern of the profile.
_WEIGHTS = (1.0, 0.0, 0.0, 0.0, 0.5, 0.5)


def multi_look(profile: Profile | None = None) -> Strategy:
    """Recency corrected by predicted use; prefetch several layers ahead (the study's strategy C).

    Layer-to-layer transition counts of a profile name the experts of the next `depth` layers from
    those of this one; what the profile says of the next token corrects recency. Both switch
    themselves off where they do not pay: see `duel` and `calibrated`.

    Args:
      profile: Counts of a trace that is not the one under test; None counts strictly earlier
        events of the trace under test instead.
    """
    online = profile is None
    retention = duel(reuse(profile, _WEIGHTS, online=online), lru())
    return with_prefetch(retention, calibrated(transitions(profile, online=online)))
