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
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax._types import PRNGKey
from moejax.cost import LayerClock, expert_compute_s
from moejax.simulate._replay import Replay, access_at, cache_shape, moments
from moejax.strategies import Access, CacheShape, Decision, Strategy, keep_best, worst

MAX_PREFETCHES = 4


class Record(NamedTuple):
    """What happened, event by event; a step's figures are sums over its layers.

    Attributes:
      num_demands: Distinct experts demanded: hits + late + misses.
      num_hits: Demanded experts that were resident and landed.
      num_late: Demanded experts whose prefetch was still on the wire.
      num_misses: Demanded experts that were absent.
      num_on_host: Misses computed on the host instead of copied.
      num_prefetches: Prefetches issued, by how many layers ahead they aimed.
      num_useful: Prefetched experts demanded for the first time since.
      num_wasted: Prefetched experts that lost their slot undemanded: this layer's own, then those
        of the layers ahead that made room for a prefetch.
      num_resident: Slots in use after the event.
      compute_s: Attention, shared and routed expert time.
      stall_s: Waiting for the link that no compute hid.
    """

    num_demands: Int[Array, "*lanes steps layers"]
    num_hits: Int[Array, "*lanes steps layers"]
    num_late: Int[Array, "*lanes steps layers"]
    num_misses: Int[Array, "*lanes steps layers"]
    num_on_host: Int[Array, "*lanes steps layers"]
    num_prefetches: Int[Array, "*lanes steps layers depth"]
    num_useful: Int[Array, "*lanes steps layers"]
    num_wasted: Int[Array, "*lanes steps layers 1+depth"]
    num_resident: Int[Array, "*lanes steps layers"]
    compute_s: Float[Array, "*lanes steps layers"]
    stall_s: Float[Array, "*lanes steps layers"]


class _Cache(NamedTuple):
    """All layers' slots and the link.

    Attributes:
      resident: Experts that hold a slot, landed or not.
      score: Score at each layer's last event; infinite for a prefetch that waits for its event.
      fresh: Prefetched and not demanded since.
      wire_layer, wire_expert: The prefetch on the wire, if `busy_s > 0`.
      busy_s: How long the link stays busy from now.
    """

    resident: Bool[Array, "layers experts"]
    score: Float[Array, "layers experts"]
    fresh: Bool[Array, "layers experts"]
    wire_layer: Int[Array, ""]
    wire_expert: Int[Array, ""]
    busy_s: Float[Array, ""]


def timeline(
    strategy: Strategy,
    replay: Replay,
    clock: LayerClock,
    capacity: Int[Array, " layers"],
    key: PRNGKey,
    *,
    topk: int,
    fixed_prefetches: int | None = None,
    is_reset: Bool[Array, " steps"] | None = None,
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
      fixed_prefetches: None prefetches by value and by the clock. A number prefetches up to that
        many experts an event, each landed by its own event: what an engine can reproduce exactly.
      is_reset: Steps before which cache, link and strategy start afresh; None never does.

    Returns:
      The record of every event.

    Reference:
      Times as in `moejax.cost.event_s`.
    """
    shape = cache_shape(replay.demand, topk)
    start = (strategy.init(shape), _empty(shape))
    layers = jnp.arange(shape.num_layers, dtype=jnp.int32)
    capacity, clock = jax.tree.map(jnp.asarray, (capacity, clock))

    def one_step(carry, step):
        moment, renew = step
        if renew is not None:
            carry = jax.tree.map(lambda old, new: jnp.where(renew, new, old), carry, start)
        states, cache = carry

        def one_layer(cache, mine):
            layer, state = mine
            access = access_at(moment, layer, shape, cache.resident, capacity)
            state, decision = strategy.step(state, access, jax.random.fold_in(key, access.event))
            cache, record = _serve(
                cache, access, decision, clock, shape, strategy.computes_on_host, fixed_prefetches
            )
            return cache, (state, record)

        # States go in and come out layer by layer: carried, they would be copied at every event.
        cache, (states, record) = jax.lax.scan(one_layer, cache, (layers, states))
        return (states, cache), record

    _, record = jax.lax.scan(one_step, start, (moments(replay), is_reset))
    return record


def _empty(shape: CacheShape) -> _Cache:
    lanes = (shape.num_layers, shape.num_experts)
    zero = jnp.zeros((), jnp.int32)
    nothing = jnp.zeros(lanes, bool)
    unscored = jnp.full(lanes, -jnp.inf, jnp.float32)
    return _Cache(nothing, unscored, nothing, zero, zero, jnp.zeros((), jnp.float32))


def _serve(
    cache: _Cache,
    access: Access,
    decision: Decision,
    clock: LayerClock,
    shape: CacheShape,
    computes_on_host: bool,
    fixed_prefetches: int | None,
) -> tuple[_Cache, Record]:
    """One event: demand, wait, compute, retention, prefetch."""
    layer = access.layer
    resident, fresh = cache.resident[layer], cache.fresh[layer]
    demanded = access.demand > 0
    index = jnp.arange(shape.num_experts)
    # A prefetch that lost its slot on the way is a miss, even if its copy is not through yet.
    on_wire = resident & (layer == cache.wire_layer) & (index == cache.wire_expert)
    on_wire = on_wire & (cache.busy_s > 0)
    if fixed_prefetches is not None:
        on_wire = jnp.zeros_like(on_wire)
    late = demanded & on_wire
    hit = demanded & resident & ~late
    miss = demanded & ~resident

    copy_s = clock.copy_s[layer]
    on_host = jnp.zeros_like(miss)
    if computes_on_host:
        on_host = _cheaper_on_host(miss, cache.busy_s, copy_s, clock.host_expert_s[layer])
    fetched = miss & ~on_host
    num_fetched = fetched.sum()
    link_free_s = cache.busy_s + num_fetched * copy_s
    waits = (num_fetched > 0) | late.any()
    wait_s = jnp.where(waits, link_free_s, 0.0)
    if computes_on_host:
        wait_s = jnp.maximum(wait_s, on_host.sum() * clock.host_expert_s[layer])
    resident_s = clock.shared_s + _compute_s(clock, layer, access.demand, hit)
    arrived_s = _compute_s(clock, layer, access.demand, late | fetched)
    hidden_s = clock.overlap_ratio * jnp.minimum(resident_s, wait_s)
    compute_s = clock.attention_s + resident_s + arrived_s
    is_last = layer == shape.num_layers - 1
    pause_s = clock.attention_s + jnp.where(is_last, clock.step_fixed_s, 0.0)
    gap_s = resident_s + arrived_s + wait_s - hidden_s + pause_s

    candidates = fetched | resident
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
        cache, num_prefetches, num_spoiled = _prefetch(
            cache, access, decision.prefetch_probability, clock, shape, gap_s, fixed_prefetches
        )
    cache = cache._replace(busy_s=jnp.maximum(cache.busy_s - gap_s, 0.0))
    record = Record(
        num_demands=demanded.sum(),
        num_hits=hit.sum(),
        num_late=late.sum(),
        num_misses=miss.sum(),
        num_on_host=on_host.sum(),
        num_prefetches=num_prefetches,
        num_useful=(fresh & demanded).sum(),
        num_wasted=jnp.append((fresh & ~demanded & ~kept).sum(), num_spoiled),
        num_resident=kept.sum(),
        compute_s=compute_s + jnp.where(is_last, clock.step_fixed_s, 0.0),
        stall_s=wait_s - hidden_s,
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


class _Queue(NamedTuple):
    """Prefetches being issued: the rows of the next `depth` layers and the link."""

    resident: Bool[Array, "depth experts"]
    score: Float[Array, "depth experts"]
    fresh: Bool[Array, "depth experts"]
    link_free_s: Float[Array, ""]
    num_issued: Int[Array, " depth"]
    num_spoiled: Int[Array, " depth"]
    last: Int[Array, " 2"]
    gain: Float[Array, ""]
    choice: Int[Array, " 2"]
    victim: Int[Array, ""]


def _prefetch(
    cache: _Cache,
    access: Access,
    probability: Float[Array, "depth experts"],
    clock: LayerClock,
    shape: CacheShape,
    gap_s: Float[Array, ""],
    fixed_prefetches: int | None,
) -> tuple[_Cache, Int[Array, " depth"], Int[Array, " depth"]]:
    """Issues the prefetches that start before the next demand is known and pay for themselves."""
    ahead = (access.layer + 1 + jnp.arange(shape.depth)) % shape.num_layers
    copy_s = clock.copy_s[ahead]
    price = _fixed_price if fixed_prefetches is not None else _clocked_price
    most = MAX_PREFETCHES if fixed_prefetches is None else fixed_prefetches

    def look(queue: _Queue) -> _Queue:
        """Finds the next prefetch and what it gains; no gain ends the queue."""
        is_full = queue.resident.sum(-1) >= access.capacity_ahead
        victim = worst(queue.score, queue.resident)
        rows = jnp.arange(shape.depth)
        lost = jnp.where(is_full, probability[rows, victim], 0.0)
        # A full layer whose worst expert is itself a waiting prefetch has no room.
        has_room = ~is_full | (queue.score[rows, victim] < jnp.inf)
        has_room = has_room & (access.capacity_ahead > 0)
        gain = price(probability, lost[:, None], copy_s[:, None], queue.link_free_s, gap_s)
        wanted = ~queue.resident & has_room[:, None] & (probability > 0)
        gain = jnp.where(wanted, gain, -jnp.inf)
        best = jnp.argmax(gain)
        row, expert = best // shape.num_experts, best % shape.num_experts
        return queue._replace(
            gain=gain[row, expert],
            choice=jnp.stack([row, expert]),
            victim=jnp.where(is_full[row], victim[row], -1),
        )

    def issue(queue: _Queue) -> _Queue:
        row, expert = queue.choice
        index = jnp.arange(shape.num_experts)
        here = (jnp.arange(shape.depth) == row)[:, None]
        entering = here & (index == expert)[None, :]
        leaving = here & (index == queue.victim)[None, :]
        return look(
            queue._replace(
                resident=(queue.resident & ~leaving) | entering,
                score=jnp.where(entering, jnp.inf, queue.score),
                fresh=(queue.fresh & ~leaving) | entering,
                link_free_s=queue.link_free_s + copy_s[row],
                num_issued=queue.num_issued + here[:, 0],
                num_spoiled=queue.num_spoiled + (leaving & queue.fresh).any(-1),
                last=queue.choice,
            )
        )

    zero = jnp.zeros((), jnp.int32)
    wire = jnp.stack([cache.wire_layer, cache.wire_expert])
    queue = look(
        _Queue(
            resident=cache.resident[ahead],
            score=cache.score[ahead],
            fresh=cache.fresh[ahead],
            link_free_s=cache.busy_s,
            num_issued=jnp.zeros(shape.depth, jnp.int32),
            num_spoiled=jnp.zeros(shape.depth, jnp.int32),
            last=wire,
            gain=jnp.zeros((), jnp.float32),
            choice=jnp.stack([zero, zero]),
            victim=zero,
        )
    )
    queue = jax.lax.while_loop(
        lambda queue: (queue.gain > 0) & (queue.num_issued.sum() < most), issue, queue
    )
    any_issued = queue.num_issued.sum() > 0
    cache = cache._replace(
        resident=cache.resident.at[ahead].set(queue.resident),
        score=cache.score.at[ahead].set(queue.score),
        fresh=cache.fresh.at[ahead].set(queue.fresh),
        busy_s=queue.link_free_s,
        wire_layer=jnp.where(any_issued, ahead[queue.last[0]], cache.wire_layer),
        wire_expert=jnp.where(any_issued, queue.last[1], cache.wire_expert),
    )
    return cache, queue.num_issued, queue.num_spoiled


def _clocked_price(probability, lost, copy_s, link_free_s, gap_s):
    """Stall expected to be saved, less link time expected to be wasted; -inf if too late to start.

    A copy that is used saves `copy_s`, less the chance that its victim is demanded instead; one
    that is not used wastes `copy_s`; and what overruns the next demand delays it either way.
    """
    overrun_s = jnp.maximum(link_free_s + copy_s - gap_s, 0.0)
    gain_s = (probability - lost) * copy_s - (1.0 - probability) * copy_s - overrun_s
    return jnp.where(link_free_s < gap_s, gain_s, -jnp.inf)


def _fixed_price(probability, lost, copy_s, link_free_s, gap_s):
    """The same in copies, without a clock."""
    return probability - lost - (1.0 - probability) + 0.0 * copy_s
