"""The hit curve H(C) of each layer: all that the tuner needs to know about a workload."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from moejax._types import PRNGKey
from moejax.simulate._blocks import BLOCK_STEPS, block_at, stream
from moejax.simulate._ranks import Marks, ranks
from moejax.strategies import Strategy

_QUEUED_BLOCKS = 16


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

    @property
    def step_misses_warm(self) -> Int[np.ndarray, "steps layers slots"]:
        """`step_misses` with cold misses forgiven: over all steps those of `hit_ratio_warm`.

        Raises:
          ValueError: The curve was made without single steps.
        """
        if self.step_misses is None:
            raise ValueError("the curve keeps no steps: make it with keep_steps")
        # With a slot for every expert only first touches miss. The n-th of them meets a free slot
        # in every cache of at least n.
        first = self.step_misses[..., -1]
        num_before = self.num_forgiven[:, -1] - first.sum(0) + first.cumsum(0) - first
        slots = np.arange(self.step_misses.shape[-1])
        num_forgiven = np.clip(slots - num_before[..., None], 0, first[..., None])
        return self.step_misses - num_forgiven


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
    source = stream(experts, num_experts, with_future=strategy.reads_future)
    counts = ranks(strategy, source, slots, key, topk=topk, marks=marks)
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
    source = stream(experts, num_experts, with_future=False)
    num_bins = num_experts + 2
    order = jnp.full((num_layers, num_experts), -2 * num_experts, jnp.int32)
    histogram = np.zeros((num_layers, num_bins), np.int64)
    queued, kept = [], []
    for start in range(0, num_steps, BLOCK_STEPS):
        block = block_at(source, start, with_future=False, with_gates=False)
        order, distances = _stack_distances(num_experts, order, block.rows[1:-1])
        queued.append(distances)
        stop = start + BLOCK_STEPS
        if stop > num_steps - keep_steps:
            steps = np.arange(BLOCK_STEPS * num_layers)[None]
            cells = np.bincount(
                (steps * num_bins + distances).ravel(), minlength=steps.size * num_bins
            )
            kept.append(cells.reshape(BLOCK_STEPS, num_layers, num_bins)[: num_steps - start])
        # The device runs one batch of blocks ahead of the counting here.
        if len(queued) == _QUEUED_BLOCKS or stop >= num_steps:
            lanes = np.arange(BLOCK_STEPS * num_layers)[None] % num_layers
            for found in queued:
                cells = np.bincount((lanes * num_bins + found).ravel(), minlength=histogram.size)
                histogram += cells.reshape(histogram.shape)
            queued = []
    histogram = histogram[:, :-1]
    # Slot counts 0..E; a first use lies beyond every capacity.
    hits = np.concatenate([np.zeros((num_layers, 1), np.int64), histogram[:, :-1].cumsum(1)], 1)
    step_misses = None
    if keep_steps:
        found = np.concatenate(kept)[-keep_steps:, :, :-1].astype(np.int32)
        below = np.pad(found[..., :-1].cumsum(-1), ((0, 0), (0, 0), (1, 0)))
        step_misses = found.sum(-1, keepdims=True) - below
    # The cache fills with first touches, one a slot.
    forgiven = np.minimum(np.arange(num_experts + 1)[None], histogram[:, -1:])
    return HitCurve(hits, forgiven, histogram.sum(1), num_steps, step_misses)


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_cpu_multi_thread_eigen": False}
)
def _stack_distances(
    num_experts: int, order: Int[Array, "layers experts"], ids: Shaped[Array, "steps layers width"]
) -> tuple[Int[Array, "layers experts"], Int[Array, "width lanes"]]:
    """Stack distance of every demand of one block; lanes are steps x layers.

    A first use is `num_experts` deep, and what is no demand, or one named twice, deeper still.

    Args:
      num_experts: Experts a layer.
      order: Recency: greater is later, negative before this block, -2 x experts never.
      ids: Demanded ids.
    """
    num_steps, num_layers, width = ids.shape
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    demand = (ids[..., None] == experts[None, None, None].astype(ids.dtype)).any(-2)
    if width > num_experts:
        ids = jnp.where(demand, experts[None, None], num_experts)
    # Within a step the lower index is the later: it is kept first.
    small = jnp.int16 if num_steps * num_experts < 2**15 else jnp.int32
    latest = num_experts * jnp.arange(num_steps, dtype=jnp.int32) + num_experts - 1

    def use(order, step):
        demanded, latest = step
        return jnp.where(demanded, (latest - experts[None]).astype(small), order), order

    order, before = jax.lax.scan(use, order.astype(small), (demand, latest))
    before = before.reshape(-1, num_experts).T
    # Cut off before they are narrowed: the largest id of 16 bits would become -1.
    ids = jnp.minimum(ids.astype(jnp.int32), num_experts)
    names = ids.reshape(num_steps * num_layers, -1).T.astype(jnp.int16)

    def find(expert, mine):
        row = jax.lax.dynamic_index_in_dim(before, expert, 0)
        return jnp.where(names == expert.astype(names.dtype), row, mine)

    def count(expert, depth):
        row = jax.lax.dynamic_index_in_dim(before, expert, 0)
        return depth + (row > mine).astype(jnp.int16)

    loop = functools.partial(jax.lax.fori_loop, 0, num_experts, unroll=8)
    mine = loop(find, jnp.full(names.shape, -2 * num_experts, small))
    depth = loop(count, jnp.zeros(names.shape, jnp.int16))
    depth = jnp.where(mine < -num_experts, num_experts, depth)
    places = jnp.arange(len(names))
    twice = (names[:, None] == names[None]) & (places[:, None] > places[None])[:, :, None]
    depth = jnp.where((names >= num_experts) | twice.any(1), num_experts + 1, depth)
    position = (order[:, None, :] > order[:, :, None]).sum(-1, dtype=jnp.int32)
    return jnp.where(order < -num_experts, -2 * num_experts, -1 - position), depth
