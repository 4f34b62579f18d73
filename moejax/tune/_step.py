"""The predicted cost of one decode step under a split of the experts over the memory tiers.

For each layer, with `r` slots that retain, `s` that are kept free for prefetches to land in, `p`
pinned and `g` pageable, `M(c)` the expected misses and `A(c)` the share of steps that miss anything
with `c` slots:

  misses        m    = M(r)
  transfer      T    = (M(r) - M(r+p)) copy + (M(r+p) - M(r+p+g)) pageable + M(r+p+g) store
  prefetches    j    = min(s, m),                    of which recall * j are demanded
  saved         S(j) = recall * j * copy - max(0, j * copy - window)
  layer         t    = attention + c_res + c_arr + (T - S) - overlap * min(A(r) c_res, T - S)

Compute hides a transfer only in a step that has one: the mean of `min(c_res, wait)` is `A(r) c_res`
for copies longer than `c_res`, far below the `min` of the means where few steps miss.

`S` counts the link time a prefetch spends: what does not fit into the window delays the demand
behind it, needed or not. It is linear between whole copies, so a single copy longer than the window
pays only if `recall > 1 - window / copy`. On a slow link with a guess that is right half of the
time nothing pays and the best share of landing slots is 0.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.cost import expert_compute_s

from ._problem import TierNumbers

Objective = Literal["latency", "p99", "bytes"]

P99 = 0.99

# The bytes objective says nothing of the tiers below the device: latency breaks its ties.
_TIE_RATIO = 1e-3


class Split(NamedTuple):
    """Slots of each layer by what they are for; whole or, while relaxed, fractional."""

    retained: Float[Array, "*batch layers"]
    landing: Float[Array, "*batch layers"]
    pinned: Float[Array, "*batch layers"]
    pageable: Float[Array, "*batch layers"]


class LayerCosts(NamedTuple):
    """What one step costs in each layer.

    Attributes:
      latency_s: Time of the layer.
      fetched_bytes: Bytes over the link, wasted prefetches included.
      num_misses: Demands that no retaining slot of the device served.
    """

    latency_s: Float[Array, " layers"]
    fetched_bytes: Float[Array, " layers"]
    num_misses: Float[Array, " layers"]


class Prediction(NamedTuple):
    """What a split is predicted to give.

    Attributes:
      step_latency_s: Mean time of a decode step.
      p99_latency_s: 99th percentile over the sample steps; not a number without samples.
      hit_ratio: Share of demands served by retaining device slots; prefetches do not count.
      fetched_bytes: Bytes a step moves to the device.
    """

    step_latency_s: Float[Array, ""]
    p99_latency_s: Float[Array, ""]
    hit_ratio: Float[Array, ""]
    fetched_bytes: Float[Array, ""]


@jax.jit
def predict(numbers: TierNumbers, split: Split) -> Prediction:
    """Predicts latency, hits and traffic of one split."""
    costs = layer_costs(numbers, numbers.num_misses, numbers.any_miss_ratio, split)
    num_demands = jnp.sum(numbers.num_misses[:, 0])
    p99_s = jnp.asarray(jnp.nan)
    if numbers.sample_misses is not None:
        p99_s = split_objective(numbers, split, objective="p99")
    return Prediction(
        step_latency_s=jnp.sum(costs.latency_s) + numbers.clock.step_fixed_s,
        p99_latency_s=p99_s,
        hit_ratio=1.0 - jnp.sum(costs.num_misses) / jnp.maximum(num_demands, 1e-9),
        fetched_bytes=jnp.sum(costs.fetched_bytes),
    )


@functools.partial(jax.jit, static_argnames="objective")
def split_objective(
    numbers: TierNumbers, split: Split, *, objective: Objective
) -> Float[Array, ""]:
    """The objective of one split: seconds, or bytes with latency as the tie-breaker."""
    return total_objective(numbers, objective_terms(numbers, split, objective), objective)


def objective_terms(
    numbers: TierNumbers, split: Split, objective: Objective
) -> Float[Array, "samples layers"]:
    """The share of each layer in the objective; one sample unless the objective is p99."""
    if objective == "p99":
        return jax.vmap(
            lambda step: layer_costs(numbers, step, jnp.minimum(step, 1.0), split).latency_s
        )(jnp.asarray(numbers.sample_misses))
    costs = layer_costs(numbers, numbers.num_misses, numbers.any_miss_ratio, split)
    if objective == "latency":
        return costs.latency_s[None]
    return (costs.fetched_bytes + tie_bytes_per_s(numbers) * costs.latency_s)[None]


def total_objective(
    numbers: TierNumbers, terms: Float[Array, "samples layers"], objective: Objective
) -> Float[Array, ""]:
    """What the layers' shares add up to, with what a step costs whatever the split."""
    totals = jnp.sum(terms, axis=-1)
    if objective == "p99":
        return jnp.quantile(totals, P99) + numbers.clock.step_fixed_s
    if objective == "latency":
        return totals[0] + numbers.clock.step_fixed_s
    return totals[0] + tie_bytes_per_s(numbers) * numbers.clock.step_fixed_s


def tie_bytes_per_s(numbers: TierNumbers) -> Float[Array, ""]:
    """Bytes that weigh as much as a second when two splits move equally many."""
    clock = numbers.clock
    num_demands = numbers.num_misses[:, 0]
    all_miss_bytes = jnp.sum(num_demands * clock.expert_bytes)
    all_miss_s = jnp.sum(num_demands * numbers.store_s)
    return _TIE_RATIO * all_miss_bytes / jnp.maximum(all_miss_s, 1e-12)


def layer_costs(
    numbers: TierNumbers,
    num_misses: Float[Array, "layers slots"],
    any_miss_ratio: Float[Array, "layers slots"],
    split: Split,
) -> LayerCosts:
    """The cost of one step in every layer, differentiable almost everywhere in the split.

    Args:
      numbers: Clock, tier costs and recall.
      num_misses: Misses against retained slots, expected or of a single step.
      any_miss_ratio: Share of steps that miss anything; 0 or 1 for a single step.
      split: Slots of each layer.
    """
    clock = numbers.clock
    num_demands = num_misses[:, 0]
    past_device = _at(num_misses, split.retained)
    past_pinned = _at(num_misses, split.retained + split.pinned)
    past_host = _at(num_misses, split.retained + split.pinned + split.pageable)
    transfer_s = (
        (past_device - past_pinned) * clock.copy_s
        + (past_pinned - past_host) * numbers.pageable_s
        + past_host * numbers.store_s
    )
    num_prefetches = jnp.minimum(split.landing, past_device)
    resident_s, arriving_s = compute_s(numbers, num_demands, past_device)
    wait_s = transfer_s - saved_s(numbers, num_prefetches)
    any_miss = _at(any_miss_ratio, split.retained)
    hidden_s = clock.overlap_ratio * jnp.minimum(any_miss * resident_s, wait_s)
    latency_s = clock.attention_s + resident_s + arriving_s + wait_s - hidden_s
    num_fetched = past_device + (1.0 - numbers.recall_ratio) * num_prefetches
    return LayerCosts(latency_s, num_fetched * clock.expert_bytes, past_device)


def compute_s(
    numbers: TierNumbers,
    num_demands: Float[Array, " layers"],
    num_misses: Float[Array, " layers"],
) -> tuple[Float[Array, " layers"], Float[Array, " layers"]]:
    """Compute time of what is on the device already, shared expert included, and of the misses."""
    clock = numbers.clock
    tokens_per_expert = numbers.num_tokens / jnp.maximum(num_demands, 1e-9)

    def experts_s(num_experts: Float[Array, " layers"]) -> Float[Array, " layers"]:
        num_tokens = tokens_per_expert * num_experts
        return jnp.asarray(
            expert_compute_s(clock.expert_read_s, clock.expert_token_s, num_experts, num_tokens)
        )

    return clock.shared_s + experts_s(num_demands - num_misses), experts_s(num_misses)


def saved_s(
    numbers: TierNumbers, num_prefetches: Float[Array, " layers"]
) -> Float[Array, " layers"]:
    """Link time that prefetches take off the demand; negative where they cost more than they save.

    Linear between whole copies: half a prefetch is one in every second step.
    """

    def whole_s(num_copies: Float[Array, " layers"]) -> Float[Array, " layers"]:
        link_s = num_copies * numbers.clock.copy_s
        return numbers.recall_ratio * link_s - jnp.maximum(0.0, link_s - numbers.window_s)

    lower = jnp.floor(num_prefetches)
    above = num_prefetches - lower
    return (1.0 - above) * whole_s(lower) + above * whole_s(lower + 1.0)


def _at(
    num_misses: Float[Array, "layers slots"], num_slots: Float[Array, " layers"]
) -> Float[Array, " layers"]:
    last = num_misses.shape[-1] - 1
    num_slots = jnp.clip(num_slots, 0.0, last)
    lower = jnp.clip(jnp.floor(num_slots), 0, last - 1)
    index = lower.astype(jnp.int32)[:, None]
    left = jnp.take_along_axis(num_misses, index, axis=-1)[:, 0]
    right = jnp.take_along_axis(num_misses, index + 1, axis=-1)[:, 0]
    return left + (num_slots - lower) * (right - left)
