"""Predictors: which experts will the coming layers demand?

A predictor is a pair like a strategy: `init(shape)` stacks the state of all layers, `step` takes
one layer's state and an event to the probability that each of the coming layers' events demands
each expert. Like a strategy's, a step also runs inside a kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.strategies._base import Access, CacheShape
from moejax.strategies._profile import Profile
from moejax.strategies._select import first_rows

_MEMORY_RATIO = 0.97
# A calibration starts sceptical, at one in two, and forgets that within its memory.
_PRIOR_EXPECTED, _PRIOR_OBSERVED = 4.0, 2.0
# Uses of an expert before its own transitions outweigh chance.
_SMOOTHING_USES = 4.0


class Predictor(NamedTuple):
    """A pair of pure functions; see the module.

    Attributes:
      init: Builds the state of all layers; every leaf leads with `layers`.
      step: Takes one layer's state and one event to the new state and probabilities of
        `min(depth, reach)` layers.
      reach: How many layers ahead it predicts at most.
      reads_gates: Whether it reads `Access.lookahead`.
    """

    init: Callable[[CacheShape], Any]
    step: Callable[[Any, Access], tuple[Any, Float[Array, "ahead experts"]]]
    reach: int
    reads_gates: bool = False


class TransitionState(NamedTuple):
    """Transition counts out of this layer, and its own demand one step ago.

    `topk` and `num_experts` are those of the model, without padding.
    """

    num_pairs: Float[Array, "*layers ahead experts experts"]
    num_uses: Float[Array, "*layers experts"]
    demand_before: Float[Array, "*layers experts"]
    topk: Float[Array, "*layers"]
    num_experts: Float[Array, "*layers"]


def transitions(
    profile: Profile | None, *, online: bool, reach: int = 4, sharpness: float = 1.6
) -> Predictor:
    """Layer-to-layer transition counts: the experts of a layer name those of the layers below.

    Args:
      profile: Where the counts start; None starts from nothing.
      online: Whether strictly earlier events of the trace under test go on being counted.
      reach: How many layers ahead to predict at most.
      sharpness: Exponent on the odds. The mean of the conditional probabilities of a token's
        experts is too cautious, since together they say more than each alone.

    Returns:
      A `Predictor`; wrap it with `calibrated` before its probabilities are priced.
    """

    def init(shape: CacheShape) -> TransitionState:
        layers, experts = shape.num_layers, shape.num_experts
        depth = min(reach, shape.depth)
        if profile is None:
            num_pairs = jnp.zeros((layers, depth, experts, experts), jnp.float32)
            num_uses = jnp.zeros((layers, experts), jnp.float32)
        else:
            num_pairs = jnp.asarray(profile.transition[:, :depth], jnp.float32)
            # Of layers farther ahead than the profile counted, nothing is known.
            beyond = depth - num_pairs.shape[1]
            num_pairs = jnp.pad(num_pairs, ((0, 0), (0, beyond), (0, 0), (0, 0)))
            num_uses = jnp.asarray(profile.num_uses, jnp.float32)
        before = jnp.zeros((layers, experts), jnp.float32)
        topk, num_experts = (jnp.full(layers, float(n)) for n in (shape.topk, experts))
        return TransitionState(num_pairs, num_uses, before, topk, num_experts)

    def step(state: TransitionState, access: Access):
        demand = access.demand.astype(jnp.float32)
        num_pairs, num_uses = state.num_pairs, state.num_uses
        if online:
            # What followed this layer's last demand is known by now; what follows this one is not.
            came = (state.demand_before > 0).astype(jnp.float32)
            followed = first_rows(access.below_before, len(num_pairs))
            followed = (followed > 0).astype(jnp.float32)
            num_pairs = num_pairs + came[None, :, None] * followed[:, None, :]
            num_uses = num_uses + came
        num_tokens = jnp.maximum(demand.sum() / state.topk, 1.0)
        vote = demand / (state.topk * num_tokens) / (num_uses + _SMOOTHING_USES)
        chance = _SMOOTHING_USES * vote.sum() * state.topk / state.num_experts
        share = _tally(vote, num_pairs) + chance
        probability = _any_of(_sharpen(share, sharpness), num_tokens)
        exists = jnp.arange(len(demand)) < state.num_experts
        return state._replace(
            num_pairs=num_pairs, num_uses=num_uses, demand_before=demand
        ), jnp.where(exists[None, :], probability, 0.0)

    return Predictor(init, step, reach)


class GateState(NamedTuple):
    """A gate has no memory; one number a layer stands for its state."""

    nothing: Int[Array, "*layers"]


def gate(*, reach: int = 8) -> Predictor:
    """The next layers' own gates, applied early to this layer's hidden state.

    Reads `access.lookahead`, in which 1 stands for the most probable expert and lower numbers
    for the ranks below it, and takes these for probabilities: wrap it with `calibrated`.

    Args:
      reach: How many layers ahead to ask at most.

    Reference:
      Eliseev, Mazur, "Fast inference of mixture-of-experts language models with offloading",
      arXiv:2312.17238, section 3.2.
    """

    def init(shape: CacheShape) -> GateState:
        return GateState(jnp.zeros(shape.num_layers, jnp.int32))

    def step(state: GateState, access: Access):
        return state, first_rows(access.lookahead, reach)

    return Predictor(init, step, reach, reads_gates=True)


class CalibrationState(NamedTuple):
    """A predictor's state, its last words, and how true they have been.

    Attributes:
      inner: State of the predictor.
      said: Probabilities said one step ago.
      num_expected: Discounted hits that confident predictions promised.
      num_observed: Discounted hits that they had.
    """

    inner: Any
    said: Float[Array, "*layers ahead experts"]
    num_expected: Float[Array, "*layers ahead"]
    num_observed: Float[Array, "*layers ahead"]


def calibrated(predictor: Predictor) -> Predictor:
    """Scales probabilities by how often confident predictions have lately come true.

    This is the switch of every prefetching strategy: when what was learned no longer holds, the
    scale falls, no prefetch is worth its price and prefetching stops; as the predictor goes on
    predicting unheard, it comes back when the scale recovers. Predictions are weighed by
    themselves, so the confident ones, which alone are bought, decide.
    """

    def init(shape: CacheShape) -> CalibrationState:
        lanes = (shape.num_layers, min(predictor.reach, shape.depth))
        said = jnp.zeros((*lanes, shape.num_experts), jnp.float32)
        expected = jnp.full(lanes, _PRIOR_EXPECTED, jnp.float32)
        observed = jnp.full(lanes, _PRIOR_OBSERVED, jnp.float32)
        return CalibrationState(predictor.init(shape), said, expected, observed)

    def step(state: CalibrationState, access: Access):
        said = state.said
        came_true = (first_rows(access.below_before, len(said)) > 0).astype(jnp.float32)
        num_expected = _MEMORY_RATIO * state.num_expected + (said * said).sum(-1)
        num_observed = _MEMORY_RATIO * state.num_observed + (said * came_true).sum(-1)
        inner, probability = predictor.step(state.inner, access)
        scale = jnp.minimum(num_observed / jnp.maximum(num_expected, 1e-6), 1.0)
        state = CalibrationState(inner, probability, num_expected, num_observed)
        return state, probability * scale[:, None]

    return predictor._replace(init=init, step=step)


def _tally(
    vote: Float[Array, " experts"], num_pairs: Float[Array, "ahead experts experts"]
) -> Float[Array, "ahead experts"]:
    """The counts of each layer ahead, weighted and summed over the experts they lead from."""
    if len(num_pairs) > 1:
        return (vote[None, :, None] * num_pairs).sum(1)
    # Beside an axis of one, XLA's sum on a CPU is several times slower.
    return (vote[:, None] * num_pairs.reshape(num_pairs.shape[1:])).sum(0)[None]


def _sharpen(probability: Float[Array, "*lanes"], sharpness: float) -> Float[Array, "*lanes"]:
    bounded = jnp.clip(probability, 1e-6, 1 - 1e-6)
    return jax.nn.sigmoid(sharpness * (jnp.log(bounded) - jnp.log1p(-bounded)))


def _any_of(probability: Float[Array, "*lanes"], num_tokens) -> Float[Array, "*lanes"]:
    """Chance that at least one of the batch's tokens demands the expert."""
    return -jnp.expm1(num_tokens * jnp.log1p(-jnp.clip(probability, 0.0, 1 - 1e-6)))
