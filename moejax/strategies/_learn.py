"""Everything a profile trace can teach, in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, UInt8

from moejax.strategies._base import CacheShape
from moejax.strategies._profile import Profile, count_profile
from moejax.strategies._reuse import FEATURES, ReuseWeights, features, observe, reuse
from moejax.trace import Trace, demand_counts, select_requests

_SEGMENT_STEPS = 256
_MAX_SEGMENTS = 8
# Learned from: every eighth step, but for the first, whose features still lack a past, and the
# last, whose answers lie beyond the segment.
_LEARNED_STEPS = slice(64, 192, 8)
_LONGEST_HORIZON = 64
# Horizons as shares of experts / topk, the mean time between two uses of an expert.
_HORIZON_RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def learn_profile(trace: Trace, *, depth: int = 4) -> Profile:
    """Counts popularity and transitions and fits the weights of learned retention.

    Args:
      trace: Profile trace; use `split_profile` to keep it apart from the one under test.
      depth: How many layers ahead to count transitions.

    Raises:
      UsageError: The trace holds fewer than two tokens.
    """
    profile = count_profile(trace, depth=depth)
    return profile._replace(reuse_weights=learn_reuse_weights(trace))


def learn_reuse_weights(trace: Trace) -> ReuseWeights | None:
    """Fits the weights of learned retention by logistic regression.

    The label of (step, layer, expert) is whether the expert is demanded again within a horizon;
    one set of weights is fitted for each of up to four horizons. The counts behind popularity and
    succession come from every other request and the labels from the rest, so that the fit sees
    those features as uncertain as they will be.

    Args:
      trace: Profile trace.

    Returns:
      Weights by horizon; None where the trace is too short to learn from.
    """
    numbers = np.arange(trace.num_requests)
    counted, labelled = trace, trace
    if trace.num_requests > 1:
        counted = select_requests(trace, numbers[::2])
        labelled = select_requests(trace, numbers[1::2])
    mean_gap = trace.num_experts / trace.topk
    horizons = np.round(np.array(_HORIZON_RATIOS) * mean_gap).astype(int)
    horizons = np.unique(np.clip(horizons, 1, _LONGEST_HORIZON))
    segments = _segments(labelled)
    if segments is None or counted.num_tokens < 2:
        return None
    shape = CacheShape(trace.num_layers, trace.num_experts, trace.topk, 0)
    rows = _feature_rows(jnp.asarray(segments), shape, count_profile(counted, depth=0))
    labels = np.stack([_used_again(segments, steps) for steps in horizons], axis=-1)
    weights = np.asarray(_fit(rows, jnp.asarray(labels)))
    return ReuseWeights(horizons.astype(np.float32), weights)


def _segments(trace: Trace) -> UInt8[np.ndarray, "segments steps layers experts"] | None:
    """Stretches of tokens spread evenly over the trace."""
    num_segments = min(_MAX_SEGMENTS, trace.num_tokens // _SEGMENT_STEPS)
    if num_segments == 0:
        return None
    starts = np.linspace(0, trace.num_tokens - _SEGMENT_STEPS, num_segments).astype(int)
    experts = np.stack([trace.experts[start : start + _SEGMENT_STEPS] for start in starts])
    demand = demand_counts(experts.reshape(-1, *experts.shape[2:]), trace.num_experts)
    return demand.reshape(num_segments, _SEGMENT_STEPS, *demand.shape[1:])


def _used_again(
    demand: UInt8[np.ndarray, "segments steps layers experts"], horizon_steps: int
) -> Bool[np.ndarray, "segments labelled layers experts"]:
    """Whether each expert is demanded within the horizon, for the steps that are learned from."""
    used = np.cumsum(demand > 0, axis=1, dtype=np.int32)
    return (used[:, horizon_steps:] > used[:, :-horizon_steps])[:, _LEARNED_STEPS]


def _feature_rows(
    demand: UInt8[Array, "segments steps layers experts"], shape: CacheShape, profile: Profile
) -> Float[Array, "segments labelled layers features experts"]:
    """The features after each step, every segment starting from the profile's counts."""
    start = reuse(profile).init(shape)

    def segment(rows):
        def step(state, item):
            number, row = item
            events = number * shape.num_layers + jnp.arange(shape.num_layers)
            state = jax.vmap(observe)(state, row, events)
            return state, jnp.stack(jax.vmap(features)(state, events), axis=1)

        return jax.lax.scan(step, start, (jnp.arange(len(rows)), rows))[1]

    return jax.jit(jax.vmap(segment))(demand)[:, _LEARNED_STEPS]


@jax.jit
def _fit(
    rows: Float[Array, "segments learned layers features experts"],
    labels: Bool[Array, "segments learned layers experts horizons"],
) -> Float[Array, "horizons features"]:
    """Logistic regressions on standardised features, by Adam with a little weight decay."""
    rows = rows.transpose(0, 1, 2, 4, 3).reshape(-1, len(FEATURES))
    target = labels.reshape(-1, labels.shape[-1]).astype(jnp.float32)
    mean, spread = rows.mean(0), rows.std(0) + 1e-3
    rows = jnp.pad((rows - mean[None, :]) / spread[None, :], ((0, 0), (0, 1)), constant_values=1.0)

    def loss(weights):
        decay = 1e-4 * jnp.sum(weights[:-1] ** 2)
        return optax.sigmoid_binary_cross_entropy(rows @ weights, target).mean(0).sum() + decay

    def descend(carry, _):
        weights, memory = carry
        updates, memory = optimiser.update(jax.grad(loss)(weights), memory)
        return (weights + updates, memory), None

    optimiser = optax.adam(0.1)
    weights = jnp.zeros((rows.shape[1], target.shape[1]))
    carry = (weights, optimiser.init(weights))
    (weights, _), _ = jax.lax.scan(descend, carry, None, length=100)
    return (weights[:-1] / spread[:, None]).T
