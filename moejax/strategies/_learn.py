"""Everything a profile trace can teach, in one call."""

from moejax.strategies._profile import Profile, count_profile
from moejax.strategies._reuse import learn_reuse_weights
from moejax.trace import Trace


def learn_profile(trace: Trace, *, depth: int = 3) -> Profile:
    """Counts popularity and transitions and fits the weights of learned retention.

    Args:
      trace: Profile trace; use `split_profile` to keep it apart from the one under test.
      depth: How many layers ahead to count transitions.

    Raises:
      UsageError: The trace holds fewer than two tokens.
    """
    profile = count_profile(trace, depth=depth)
    return profile._replace(reuse_weights=learn_reuse_weights(trace))
