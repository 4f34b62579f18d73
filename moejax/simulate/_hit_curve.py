"""The hit curve H(C) of each layer: all that the tuner needs to know about a workload."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from moejax._types import PRNGKey
from moejax.simulate._ranks import Marks, ranks
from moejax.simulate._replay import replay
from moejax.strategies import Strategy
from moejax.trace import demand_counts

_BLOCK_STEPS = 256


class HitCurve(NamedTuple):
    """Exact hits of a demand-only replay at every capacity.

    Attributes:
      num_hits: Hits of each layer; the index is the number of slots.
      num_forgiven: First touches while a slot was free.
      num_demands: Distinct experts demanded of each layer.
      num_steps: Steps replayed.
      step_misses: Misses of each step and layer, for percentiles; None unless asked for.
    """

    num_hits: Int[np.ndarray, "layers slots"]
    num_forgiven: Int[np.ndarray, "layers slots"]
    num_demands: Int[np.ndarray, " layers"]
    num_steps: int
    step_misses: Int[np.ndarray, "steps layers slots"] | None = None

    @property
    def hit_ratio(self) -> Float[np.ndarray, "layers slots"]:
        """Hits over demands of each layer: every load is a miss."""
        return self.num_hits / np.maximum(1, self.num_demands)[:, None]

    @property
    def hit_ratio_warm(self) -> Float[np.ndarray, "layers slots"]:
        """The same with cold misses forgiven: what a long run tends to."""
        return (self.num_hits + self.num_forgiven) / np.maximum(1, self.num_demands)[:, None]


def hit_curve(
    strategy: Strategy,
    experts: Shaped[np.ndarray, "steps layers width"],
    num_experts: int,
    key: PRNGKey,
    *,
    topk: int,
    marks: Marks | None = None,
) -> HitCurve:
    """The hit curve of any strategy, by replaying every capacity.

    Args:
      strategy: What scores; only its retention counts.
      experts: Batched routing, as `batch_trace` gives it.
      num_experts: Experts a layer.
      key: Consumed by the strategy.
      topk: Experts one token demands.
      marks: Resets between requests.
    """
    slots = np.arange(num_experts + 1)
    counts = ranks(strategy, replay(experts, num_experts), slots, key, topk=topk, marks=marks)
    return HitCurve(counts.num_hits, counts.num_forgiven, counts.num_demands, len(experts))


def lru_hit_curve(
    experts: Shaped[np.ndarray, "steps layers width"],
    num_experts: int,
    *,
    keep_steps: int = 0,
) -> HitCurve:
    """The hit curve of LRU in closed form: one pass gives every capacity.

    LRU keeps the experts in one order of recency whatever the capacity, so a demand hits exactly
    the caches larger than its *stack distance*: how many experts were used later than it, or in
    the same step at a lower index.

    Args:
      experts: Batched routing, as `batch_trace` gives it.
      num_experts: Experts a layer.
      keep_steps: How many of the last steps to keep in `step_misses`; 0 keeps none.

    Reference:
      Mattson et al., "Evaluation techniques for storage hierarchies", 1970.
    """
    num_steps, num_layers, _ = experts.shape
    last_use = jnp.full((num_layers, num_experts), -1, jnp.int32)
    histogram = np.zeros((num_layers, num_experts + 1), np.int64)
    kept = []
    for start in range(0, num_steps, _BLOCK_STEPS):
        demand = demand_counts(experts[start : start + _BLOCK_STEPS], num_experts) > 0
        padded = np.pad(demand, ((0, _BLOCK_STEPS - len(demand)), (0, 0), (0, 0)))
        last_use, distances = _stack_distances(last_use, padded, start)
        block = np.asarray(distances)[: len(demand)]
        histogram += block.sum(0, dtype=np.int64)
        if start + len(demand) > num_steps - keep_steps:
            kept.append(block)
    # Slot counts 0..E; a first use lies beyond every capacity.
    hits = np.concatenate([np.zeros((num_layers, 1), np.int64), histogram[:, :-1].cumsum(1)], 1)
    step_misses = None
    if keep_steps:
        found = np.concatenate(kept)[-keep_steps:].astype(np.int32)
        below = np.pad(found[..., :-1].cumsum(-1), ((0, 0), (0, 0), (1, 0)))
        step_misses = found.sum(-1, keepdims=True) - below
    # The cache fills with first touches, one a slot.
    forgiven = np.minimum(np.arange(num_experts + 1)[None], histogram[:, -1:])
    return HitCurve(hits, forgiven, histogram.sum(1), num_steps, step_misses)


@functools.partial(jax.jit, donate_argnums=0)
def _stack_distances(last_use, demand, start):
    """Histograms of stack distance of each step: [steps, layers, experts + 1]."""
    num_experts = demand.shape[-1]
    bins = jnp.arange(num_experts + 1)
    lower = jnp.arange(num_experts)[None, :] < jnp.arange(num_experts)[:, None]

    def one_step(last_use, step):
        now, demanded = step
        mine, other = last_use[:, :, None], last_use[:, None, :]
        before = (other > mine) | ((other == mine) & lower[None])
        distance = before.sum(-1)
        distance = jnp.where(last_use >= 0, distance, num_experts)
        hit = (distance[:, :, None] == bins[None, None, :]) & demanded[:, :, None]
        return jnp.where(demanded, now, last_use), hit.sum(1, dtype=jnp.uint16)

    steps = start + jnp.arange(len(demand), dtype=jnp.int32)
    return jax.lax.scan(one_step, last_use, (steps, demand))
