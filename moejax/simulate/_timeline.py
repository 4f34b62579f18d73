"""Rung 2: the events of decoding with a clock.

One layer of one step is one event. Times are relative to the moment the event's demand is known,
so nothing loses precision however long the run. For each event:

1. Demand is known. Prefetches that have not started by now were never issued; at most one is
   still on the wire, and it finishes (`busy_s`).
2. Each miss is copied in id order behind it; a demanded expert still on the wire is *late*.
3. Resident experts and the shared expert compute while misses arrive:
   `wait = last arrival`, `time = c_res + c_arr + wait - overlap * min(c_res, wait)`.
4. The strategy scores and the best `capacity` stay. Prefetches run on the idle link until the
   next demand is known, each only if the stall it is expected to save exceeds its price.

With a `PrefetchSchedule` no clock decides what is prefetched and when it lands, and times follow:
a late one waits for the rows that are missing, and what was copied beside layers costs the share
of its copy that they do not hide, at the event before which it landed.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax._types import PRNGKey
from moejax.cost import LayerClock, expert_compute_s
from moejax.simulate._layer_states import Parts, joined, layer_of, part, with_layer
from moejax.simulate._prefetch import (
    Cache,
    PrefetchSchedule,
    prefetch_by_clock,
    prefetch_by_schedule,
    start_cache,
    wire_by_clock,
    wire_by_schedule,
)
from moejax.simulate._replay import MAX_DEPTH, Replay, access_at, cache_shape, moments
from moejax.strategies import Access, CacheShape, Decision, Strategy, keep_best

TIMELINE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {"xla_disable_hlo_passes": "tree_reduction_rewriter"}
)
"""Options for whoever compiles a timeline. On a CPU XLA makes windows of every reduction over more
than 32 numbers, which take it many times as long; a layer has more experts than that."""


class Record(NamedTuple):
    """What happened, event by event; a step's figures are sums over its layers.

    Attributes:
      num_demands: Distinct experts demanded: hits + late + misses.
      num_hits: Demanded experts that were resident and landed.
      num_late: Demanded experts whose prefetch was still on the wire.
      num_misses: Demanded experts that were absent.
      num_on_host: Misses computed on the host instead of copied.
      num_fetched_rows: Rows copied, by a schedule: a miss and a late expert count whole, a prefetch
        at the event before which it landed or at which it was dropped. 0 by the clock.
      num_prefetches: Prefetches issued, by how many layers ahead they aimed.
      num_useful: Prefetched experts demanded for the first time since.
      num_wasted: Prefetched experts that lost their slot undemanded: this layer's own, then those
        of the layers ahead that made room for a prefetch.
      num_resident: Slots in use after the event.
      compute_s: Attention, shared and routed expert time.
      stall_s: Waiting for the link that no compute hid, and what prefetches slow compute by.
    """

    num_demands: Int[Array, "*lanes steps layers"]
    num_hits: Int[Array, "*lanes steps layers"]
    num_late: Int[Array, "*lanes steps layers"]
    num_misses: Int[Array, "*lanes steps layers"]
    num_on_host: Int[Array, "*lanes steps layers"]
    num_fetched_rows: Int[Array, "*lanes steps layers"]
    num_prefetches: Int[Array, "*lanes steps layers depth"]
    num_useful: Int[Array, "*lanes steps layers"]
    num_wasted: Int[Array, "*lanes steps layers 1+depth"]
    num_resident: Int[Array, "*lanes steps layers"]
    compute_s: Float[Array, "*lanes steps layers"]
    stall_s: Float[Array, "*lanes steps layers"]


def timeline(
    strategy: Strategy,
    replay: Replay,
    clock: LayerClock,
    capacity: Int[Array, " layers"],
    key: PRNGKey,
    *,
    topk: int,
    schedule: PrefetchSchedule | None = None,
    is_reset: Bool[Array, " steps"] | None = None,
    start_resident: Bool[Array, "layers experts"] | None = None,
) -> Record:
    """Replays one lane of routing with a clock.

    A pure function of arrays: `jax.vmap` it over capacities, batches, seeds and clocks, and build
    `strategy` inside the mapped function to map over its hyper-parameters.

    Args:
      strategy: What scores.
      replay: Demand step by step.
      clock: Times of one layer for this batch; see `moejax.cost.layer_clock`.
      capacity: Slots of each layer.
      key: Consumed by the strategy, split by event.
      topk: Experts one token demands.
      schedule: None prefetches by value and by the clock; a schedule prefetches one expert at a
        time, landed so many events later: what an engine can reproduce exactly.
      is_reset: Steps before which cache, link and strategy start afresh; None never does.
      start_resident: What the slots hold at the start, such as a prompt left there; no more than
        `capacity` a layer. None starts cold.

    Returns:
      The record of every event.

    Reference:
      Times as in `moejax.cost.event_s`.
    """
    shape = cache_shape(replay.demand, topk, MAX_DEPTH if schedule is None else schedule.depth)
    start = (strategy.init(shape), start_cache(shape, start_resident))
    layers = jnp.arange(shape.num_layers, dtype=jnp.int32)
    capacity, clock = jax.tree.map(jnp.asarray, (capacity, clock))

    def one_step(carry, step):
        moment, renew = step
        if renew is not None:
            carry = jax.tree.map(lambda old, new: jnp.where(renew, new, old), carry, start)
        states, cache = carry

        def one_layer(carry, row):
            tables, cache = carry
            layer, state = row
            table = layer_of(tables, layer)
            access = access_at(moment, layer, shape, cache.resident, capacity)
            state, decision = strategy.step(
                joined(Parts(table, state)), access, jax.random.fold_in(key, access.event)
            )
            cache, record = _serve(
                cache, access, decision, clock, shape, strategy.computes_on_host, schedule
            )
            after = part(state, shape)
            return (with_layer(tables, layer, table, after.tables), cache), (after.rows, record)

        tables, rows = part(states, shape, num_layers=shape.num_layers)
        (tables, cache), (rows, record) = jax.lax.scan(one_layer, (tables, cache), (layers, rows))
        states = joined(Parts(tables, rows))
        return (states, cache), record

    _, record = jax.lax.scan(one_step, start, (moments(replay), is_reset))
    return record


def _serve(
    cache: Cache,
    access: Access,
    decision: Decision,
    clock: LayerClock,
    shape: CacheShape,
    computes_on_host: bool,
    schedule: PrefetchSchedule | None,
) -> tuple[Cache, Record]:
    """One event: demand, wait, compute, retention, prefetch."""
    layer = access.layer
    resident, fresh = cache.resident[layer], cache.fresh[layer]
    demanded = access.demand > 0
    copy_s = clock.copy_s[layer]
    if schedule is None:
        wire = wire_by_clock(cache, access)
    else:
        wire = wire_by_schedule(cache, access, schedule, copy_s)
    late = wire.late
    hit = demanded & resident & ~late
    miss = demanded & ~resident

    on_host = jnp.zeros_like(miss)
    if computes_on_host:
        on_host = _cheaper_on_host(miss, wire.busy_s, copy_s, clock.host_expert_s[layer])
    fetched = miss & ~on_host
    num_fetched = fetched.sum()
    link_free_s = wire.busy_s + num_fetched * copy_s
    waits = (num_fetched > 0) | late.any()
    wait_s = jnp.where(waits, link_free_s, 0.0)
    if computes_on_host:
        wait_s = jnp.maximum(wait_s, on_host.sum() * clock.host_expert_s[layer])
    resident_s = clock.shared_s + _compute_s(clock, layer, access.demand, hit)
    arrived_s = _compute_s(clock, layer, access.demand, late | fetched)
    hidden_s = clock.overlap_ratio * jnp.minimum(resident_s, wait_s)
    shadow_s = wire.shadow_ratio * clock.shadow_copy_s[layer]
    compute_s = clock.attention_s + resident_s + arrived_s
    is_last = layer == shape.num_layers - 1
    pause_s = clock.attention_s + jnp.where(is_last, clock.step_fixed_s, 0.0)
    gap_s = resident_s + arrived_s + wait_s - hidden_s + shadow_s + pause_s

    candidates = (fetched | resident) & ~wire.dropped
    if decision.admit is not None:
        candidates = candidates & decision.admit
    score = decision.keep_score.astype(jnp.float32)
    kept = keep_best(score, candidates, access.capacity)
    cache = cache._replace(
        resident=cache.resident.at[layer].set(kept),
        score=cache.score.at[layer].set(score),
        fresh=cache.fresh.at[layer].set(fresh & kept & ~demanded),
        busy_s=link_free_s,
    )
    num_prefetches = num_spoiled = jnp.zeros(shape.depth, jnp.int32)
    if decision.prefetch_probability is not None and shape.depth:
        probability = decision.prefetch_probability
        beyond = shape.depth - len(probability)
        probability = jnp.pad(probability, ((0, beyond), (0, 0)))
        if schedule is None:
            cache, num_prefetches, num_spoiled = prefetch_by_clock(
                cache, access, probability, clock, shape, gap_s
            )
        else:
            cache, num_prefetches, num_spoiled = prefetch_by_schedule(
                cache, access, probability, shape, schedule, wire.is_free
            )
    cache = cache._replace(busy_s=jnp.maximum(cache.busy_s - gap_s, 0.0))
    rows_per_miss = 0 if schedule is None else schedule.num_rows
    record = Record(
        num_demands=demanded.sum(),
        num_hits=hit.sum(),
        num_late=late.sum(),
        num_misses=miss.sum(),
        num_on_host=on_host.sum(),
        num_fetched_rows=num_fetched * rows_per_miss + wire.num_rows,
        num_prefetches=num_prefetches,
        num_useful=(fresh & demanded).sum(),
        num_wasted=jnp.append((fresh & ~demanded & ~kept).sum(), num_spoiled),
        num_resident=kept.sum(),
        compute_s=compute_s + jnp.where(is_last, clock.step_fixed_s, 0.0),
        stall_s=wait_s - hidden_s + shadow_s,
    )
    return cache, record


def _compute_s(clock: LayerClock, layer, demand, chosen) -> Float[Array, ""]:
    num_tokens = jnp.where(chosen, demand, 0).sum()
    read_s, token_s = clock.expert_read_s[layer], clock.expert_token_s[layer]
    return jnp.asarray(expert_compute_s(read_s, token_s, chosen.sum(), num_tokens))


def _cheaper_on_host(miss, busy_s, copy_s, host_s) -> Bool[Array, " experts"]:
    """The misses left to the host when link and host share them so that the later ends soonest."""
    num_misses = miss.sum()
    num_copied = jnp.arange(len(miss) + 1)
    link_s = jnp.where(num_copied > 0, busy_s + num_copied * copy_s, 0.0)
    ends_s = jnp.maximum(link_s, (num_misses - num_copied) * host_s)
    best = jnp.argmin(jnp.where(num_copied <= num_misses, ends_s, jnp.inf))
    return miss & (jnp.cumsum(miss) > best)
