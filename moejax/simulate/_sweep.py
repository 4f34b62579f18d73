"""Strategies x capacities on one trace: counts, and times where a clock is given."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from moejax.cost import LayerClock
from moejax.simulate._pool import pool
from moejax.simulate._ranks import Counts, Marks, ranks
from moejax.simulate._replay import Replay
from moejax.simulate._timeline import TIMELINE_OPTIONS, Record, timeline
from moejax.strategies import STRATEGIES, Profile, Strategy, always_admit, check_pool

Progress = Callable[[int, int, str], None]


def sweep(
    strategies: Sequence[str],
    lane: Replay,
    capacities: Int[np.ndarray, "capacities layers"],
    *,
    topk: int,
    marks: Marks,
    profile: Profile | None = None,
    clock: LayerClock | None = None,
    admits_always: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Replays one trace for every strategy and capacity, each layer with its own slots.

    Counts are those of demand fetching alone; with a clock, the timeline adds the times, and the
    hits and bytes with prefetch.

    Args:
      strategies: Names in the registry.
      lane: Routing to replay.
      capacities: Slots of each layer, a row a capacity.
      topk: Experts one token demands.
      marks: Decode steps and resets; times are of all steps.
      profile: What may be learned beforehand.
      clock: Times of one layer; None counts only.
      admits_always: Whether a demanded expert enters the cache even if it is not worth a slot.
      seed: Seed of the strategies.
      progress: Told after each strategy.

    Returns:
      One record a strategy and capacity, in that order.
    """
    records = []
    for done, name in enumerate(strategies):
        strategy = STRATEGIES[name].make(profile)
        strategy = always_admit(strategy) if admits_always else strategy
        key = jax.random.key(seed)
        counts = ranks(strategy, lane, capacities.T, key, topk=topk, marks=marks)
        found = [_counted(name, counts, i, "layer") for i in range(len(capacities))]
        if clock is not None:
            times = _timed(strategy, lane, clock, capacities, key, topk, marks)
            found = [one | timed for one, timed in zip(found, times, strict=True)]
        records += found
        if progress is not None:
            progress(done + 1, len(strategies), name)
    return records


def check_pool_strategies(names: Sequence[str]) -> None:
    """Refuses by its name the first strategy that cannot serve a pool.

    Raises:
      UsageError: There is one.
    """
    for name in names:
        check_pool(STRATEGIES[name].keeps_layers_apart, name)


def sweep_pool(
    strategies: Sequence[str],
    lane: Replay,
    capacities: Int[np.ndarray, " capacities"],
    *,
    topk: int,
    marks: Marks,
    weight: Int[np.ndarray, " layers"] | None = None,
    profile: Profile | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """`sweep` with one pool for all layers, without times; capacities are in units of `weight`.

    Raises:
      UsageError: One of the strategies cannot serve a pool.
    """
    check_pool_strategies(strategies)
    records = []
    for done, name in enumerate(strategies):
        strategy = STRATEGIES[name].make(profile)
        key = jax.random.key(seed)
        counts = pool(strategy, lane, capacities, key, topk=topk, weight=weight, marks=marks)
        records += [_counted(name, counts, i, "pool") for i in range(len(capacities))]
        if progress is not None:
            progress(done + 1, len(strategies), name)
    return records


def _counted(name: str, counts: Counts, index: int, scope: str) -> dict[str, Any]:
    """The record of one strategy at one capacity."""
    num_hits, num_demands = counts.num_hits[:, index], int(counts.num_demands.sum())
    record = {
        "strategy": name,
        "scope": scope,
        "hit_ratio": float(counts.hit_ratio[index]),
        "hit_ratio_warm": float(counts.hit_ratio_warm[index]),
        "num_hits": int(num_hits.sum()),
        "num_loads": num_demands - int(num_hits.sum()),
        "per_layer_hit_ratio": (num_hits / np.maximum(1, counts.num_demands)).tolist(),
    }
    if counts.num_decode_demands.sum() > 0:
        hits = counts.num_decode_hits[:, index].sum()
        record["decode_hit_ratio"] = float(hits / counts.num_decode_demands.sum())
    return record


def _timed(
    strategy: Strategy, lane: Replay, clock: LayerClock, capacities, key, topk: int, marks: Marks
) -> list[dict[str, float]]:
    is_reset = jnp.asarray(marks.is_reset) if marks.is_reset.any() else None

    def one(lane, clock, capacity, key):
        return timeline(strategy, lane, clock, capacity, key, topk=topk, is_reset=is_reset)

    mapped = jax.jit(
        jax.vmap(one, in_axes=(None, None, 0, None)), compiler_options=dict(TIMELINE_OPTIONS)
    )
    lane = jax.tree.map(jnp.asarray, lane)
    record = jax.device_get(mapped(lane, clock, jnp.asarray(capacities), key))
    lanes = (
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), record)
        for i in range(len(capacities))
    )
    return [_times(one, clock) for one in lanes]


def _times(record: Record, clock: LayerClock) -> dict[str, float]:
    latency_s = (record.compute_s + record.stall_s).sum(-1)
    means = step_means(record, clock)
    # The record's own hit ratio is that of demand fetching alone.
    return {
        "step_latency_s": float(latency_s.mean()),
        "p99_latency_s": float(np.percentile(latency_s, 99)),
        "timed_hit_ratio": means.pop("hit_ratio"),
        "num_prefetches": int(record.num_prefetches.sum()),
        **means,
    }


def step_means(record: Record, clock: LayerClock) -> dict[str, float]:
    """Ratios of a timed replay, and its times and bytes as means a step.

    Args:
      record: One lane, its leaves [steps, layers] and in float64.
      clock: Times and sizes of that lane.
    """
    size, copy_s = np.asarray(clock.expert_bytes, np.float64), np.asarray(clock.copy_s, np.float64)
    num_steps, num_demands = len(record.num_hits), max(1.0, float(record.num_demands.sum()))
    num_fetched = record.num_misses - record.num_on_host + by_target(record.num_prefetches)
    num_wasted = by_target(record.num_wasted, nearest=0)
    return {
        "hit_ratio": float(record.num_hits.sum() / num_demands),
        "late_ratio": float(record.num_late.sum() / num_demands),
        "fetched_bytes": float((num_fetched @ size).sum() / num_steps),
        "wasted_bytes": float((num_wasted @ size).sum() / num_steps),
        "stall_s": float(record.stall_s.sum() / num_steps),
        "compute_s": float(record.compute_s.sum() / num_steps),
        "transfer_s": float((num_fetched @ copy_s).sum() / num_steps),
    }


def by_target(
    counts: Shaped[np.ndarray | Array, "steps layers ahead"], *, nearest: int = 1
) -> Shaped[np.ndarray, "steps layers"]:
    """Counts of layers ahead, by the layer they are about instead of the one that counted.

    Args:
      counts: The last axis is how many layers ahead, from `nearest` on.
      nearest: 0 where the first column is the counting layer itself.
    """
    counts = np.asarray(counts)
    rolled = [
        np.roll(counts[..., column], nearest + column, axis=1) for column in range(counts.shape[-1])
    ]
    return np.sum(rolled, axis=0) if rolled else counts.sum(-1)
