"""What the simulator says an engine must have counted, event by event."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Shaped, UInt

from moejax.cost import LayerClock
from moejax.engine import COUNTS
from moejax.offload import SlotPlan
from moejax.simulate import TIMELINE_OPTIONS, PrefetchSchedule, Replay, replay, timeline
from moejax.simulate._replay import access_at, cache_shape, moments
from moejax.strategies import Strategy, keep_best


def simulated_counts(
    strategy: Strategy,
    plan: SlotPlan,
    experts: UInt[np.ndarray, "steps layers places_topk"],
    *,
    num_experts: int,
    topk: int,
    num_rows: int,
    schedule: PrefetchSchedule | None = None,
    lookahead: Shaped[np.ndarray, "steps layers ahead places width"] | None = None,
) -> Int32[np.ndarray, "steps layers counts"]:
    """Replays routing through the simulator, on the CPU, from empty slots.

    Args:
      strategy: What scores.
      plan: The slots.
      experts: Routing, as `batch_trace` gives it.
      num_experts: Experts of a layer.
      topk: Experts of a token.
      num_rows: Rows of one packed expert.
      schedule: The engine's prefetch; None if it prefetches nothing.
      lookahead: What the next gates said of each place.

    Returns:
      The columns of `moejax.engine.COUNTS`.
    """
    lane = replay(experts, num_experts, lookahead=lookahead)
    with jax.default_device(jax.devices("cpu")[0]):
        if plan.scope == "pool":
            columns = _pool_columns(strategy, lane, plan.num_slots, topk, num_rows)
        else:
            columns = _layer_columns(strategy, lane, plan, topk, num_rows, schedule)
        return np.stack([np.asarray(columns[name], np.int32) for name in COUNTS], axis=-1)


def first_difference(
    measured: Int[np.ndarray, "steps layers counts"],
    simulated: Int[np.ndarray, "steps layers counts"],
) -> str | None:
    """Where the counts part for the first time, in words; None where they are equal."""
    if measured.shape != simulated.shape:
        return f"shapes {measured.shape} and {simulated.shape} differ"
    differs = measured != simulated
    if not differs.any():
        return None
    step, layer, column = (int(index) for index in np.argwhere(differs)[0])
    ours, theirs = measured[step, layer, column], simulated[step, layer, column]
    return f"step {step}, layer {layer}: {ours} {COUNTS[column]}, simulated {theirs}"


def _layer_columns(
    strategy: Strategy,
    lane: Replay,
    plan: SlotPlan,
    topk: int,
    num_rows: int,
    schedule: PrefetchSchedule | None,
) -> dict[str, Array]:
    clock = _timeless(len(plan.slots))
    capacity = np.asarray(plan.slots, np.int32)
    record = run_timeline(strategy, lane, clock, capacity, topk, schedule)
    fetched_rows = num_rows * record.num_misses if schedule is None else record.num_fetched_rows
    return {
        "demands": record.num_demands,
        "hits": record.num_hits,
        "late": record.num_late,
        "misses": record.num_misses,
        "prefetches": record.num_prefetches.sum(-1),
        "fetched_rows": fetched_rows,
    }


@functools.partial(
    jax.jit,
    static_argnames=("strategy", "topk", "schedule"),
    compiler_options=dict(TIMELINE_OPTIONS),
)
def run_timeline(strategy, lane, clock, capacity, topk, schedule):
    """The timeline of one lane, compiled once for a strategy object and a shape."""
    return timeline(
        strategy, lane, clock, capacity, jax.random.key(0), topk=topk, schedule=schedule
    )


def _timeless(num_layers: int) -> LayerClock:
    """A clock that stands still; by it no prefetch without a schedule can ever begin."""
    of_all = {"attention_s", "shared_s", "step_fixed_s", "overlap_ratio"}
    sizes = {name: () if name in of_all else (num_layers,) for name in LayerClock._fields}
    return LayerClock(**{name: jnp.zeros(size, jnp.float32) for name, size in sizes.items()})


def _pool_columns(
    strategy: Strategy, lane: Replay, num_slots: int, topk: int, num_rows: int
) -> dict[str, Any]:
    """A pool is never prefetched into."""
    demands, hits = _run_pool(strategy, lane, np.int32(num_slots), topk)
    nothing = np.zeros_like(hits)
    misses = demands - hits
    return {
        "demands": demands,
        "hits": hits,
        "late": nothing,
        "misses": misses,
        "prefetches": nothing,
        "fetched_rows": num_rows * misses,
    }


@functools.partial(jax.jit, static_argnames=("strategy", "topk"))
def _run_pool(strategy, lane, num_slots, topk):
    """Demands and hits of every event: `moejax.simulate.pool` tells their totals."""
    shape = cache_shape(lane.demand, topk)
    lanes = (shape.num_layers, shape.num_experts)
    capacity = jnp.broadcast_to(num_slots, (shape.num_layers,))
    unscored = jnp.full(lanes, -jnp.inf, jnp.float32)

    def one_event(carry, event):
        (states, resident, score), (moment, layer) = carry, event
        access = access_at(moment, layer, shape, resident, capacity)
        state = jax.tree.map(lambda leaf: leaf[layer], states)
        state, decision = strategy.step(state, access, jax.random.key(0))
        states = jax.tree.map(lambda leaf, new: leaf.at[layer].set(new), states, state)
        demanded = access.demand > 0
        num_hits = (demanded & resident[layer]).sum()
        candidates = resident.at[layer].set(resident[layer] | demanded)
        if decision.admit is not None:
            candidates = candidates.at[layer].set(candidates[layer] & decision.admit)
        score = score.at[layer].set(decision.keep_score.astype(jnp.float32))
        kept = keep_best(score.ravel(), candidates.ravel(), num_slots)
        return (states, kept.reshape(lanes), score), (demanded.sum(), num_hits)

    def one_step(carry, moment):
        layers = jnp.arange(shape.num_layers, dtype=jnp.int32)
        return jax.lax.scan(lambda old, layer: one_event(old, (moment, layer)), carry, layers)

    start = (strategy.init(shape), jnp.zeros(lanes, bool), unscored)
    return jax.lax.scan(one_step, start, moments(lane))[1]
