"""Prefetches under way: by the clock, or by the fixed schedule that an engine can keep.

By the clock, up to `MAX_PREFETCHES` run on the idle link between two demands, each only if the
stall it is expected to save exceeds its price. By the schedule, no clock decides: one prefetch at
most is under way, and it has landed so many events later whatever the link does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.cost import LayerClock
from moejax.strategies import (
    CHANCE_STEPS,
    NEVER,
    PREFETCH_PRICE_RATIO,
    Access,
    CacheShape,
    worst,
)

MAX_PREFETCHES = 4


class PrefetchSchedule(NamedTuple):
    """When a prefetch lands, counted in events: what an engine can reproduce exactly.

    Attributes:
      layers_per_copy: A prefetch issued after event i has landed before the demand of event
        i + layers_per_copy; demanded earlier it is late, passed over earlier it is dropped.
      depth: How many layers ahead a prefetch may aim.
      num_rows: Rows of an expert, the unit that copies are counted in.
      rows_per_event: Rows that are copied during one event.
      rows_before_demand: Rows of an event that are copied before its experts are computed.
    """

    layers_per_copy: int
    depth: int
    num_rows: int
    rows_per_event: int
    rows_before_demand: int


class Cache(NamedTuple):
    """All layers' slots and the link.

    Attributes:
      resident: Experts that hold a slot, landed or not.
      score: Score at each layer's last event; infinite for a prefetch that waits for its event.
      fresh: Prefetched and not demanded since.
      wire_layer, wire_expert: The prefetch under way: by the clock if `busy_s > 0`, by a schedule
        if `wire_event` is not `NEVER`.
      wire_event: Event after which it was issued; only a schedule keeps it.
      busy_s: How long the link stays busy from now; only a clock keeps it.
    """

    resident: Bool[Array, "layers experts"]
    score: Float[Array, "layers experts"]
    fresh: Bool[Array, "layers experts"]
    wire_layer: Int[Array, ""]
    wire_expert: Int[Array, ""]
    wire_event: Int[Array, ""]
    busy_s: Float[Array, ""]


def start_cache(
    shape: CacheShape, start_resident: Bool[Array, "layers experts"] | None = None
) -> Cache:
    """An idle link, and slots that hold nothing or what is given."""
    lanes = (shape.num_layers, shape.num_experts)
    zero = jnp.zeros((), jnp.int32)
    nothing = jnp.zeros(lanes, bool)
    resident = nothing if start_resident is None else jnp.asarray(start_resident, bool)
    unscored = jnp.full(lanes, -jnp.inf, jnp.float32)
    never = jnp.full((), NEVER, jnp.int32)
    return Cache(resident, unscored, nothing, zero, zero, never, jnp.zeros((), jnp.float32))


class Wire(NamedTuple):
    """The prefetch under way, as the demand of an event finds it.

    Attributes:
      late: The expert whose copy is not through though it is demanded, if there is one.
      dropped: The expert whose copy is given up, since its event does not demand it.
      busy_s: How long the link is busy before it can copy a miss.
      shadow_ratio: Share of a copy that ran beside layers and is accounted for now.
      num_rows: Rows of it that this event accounts for.
      is_free: Whether the next prefetch may be issued after this event.
    """

    late: Bool[Array, " experts"]
    dropped: Bool[Array, " experts"]
    busy_s: Float[Array, ""]
    shadow_ratio: Float[Array, ""]
    num_rows: Int[Array, ""]
    is_free: Bool[Array, ""]


def wire_by_clock(cache: Cache, access: Access) -> Wire:
    """A copy ends when the clock says so; one that is not demanded goes on."""
    # A prefetch that lost its slot on the way is a miss, even if its copy is not through yet.
    on_wire = access.resident & (access.layer == cache.wire_layer) & (cache.busy_s > 0)
    on_wire = on_wire & (jnp.arange(len(access.demand)) == cache.wire_expert)
    return Wire(
        late=(access.demand > 0) & on_wire,
        dropped=jnp.zeros_like(on_wire),
        busy_s=cache.busy_s,
        shadow_ratio=jnp.zeros(()),
        num_rows=jnp.zeros((), jnp.int32),
        is_free=jnp.ones((), bool),
    )


def wire_by_schedule(
    cache: Cache, access: Access, schedule: PrefetchSchedule, copy_s: Float[Array, ""]
) -> Wire:
    """A copy ends after so many events; the link is busy only with what is left of a late one."""
    is_issued = cache.wire_event != NEVER
    num_events = access.event - cache.wire_event
    is_landing = is_issued & (num_events >= schedule.layers_per_copy)
    is_due = is_issued & (cache.wire_layer == access.layer)
    unlanded = is_due & ~is_landing & (jnp.arange(len(access.demand)) == cache.wire_expert)
    late, dropped = unlanded & (access.demand > 0), unlanded & (access.demand == 0)
    num_copied = (num_events - 1) * schedule.rows_per_event + schedule.rows_before_demand
    num_copied = jnp.clip(num_copied, 0, schedule.num_rows)
    done_ratio = num_copied / schedule.num_rows
    is_given_up = late.any() | dropped.any()
    is_whole = is_landing | late.any()
    return Wire(
        late=late,
        dropped=dropped,
        busy_s=jnp.where(late.any(), (1.0 - done_ratio) * copy_s, 0.0),
        shadow_ratio=jnp.where(is_given_up, done_ratio, jnp.where(is_landing, 1.0, 0.0)),
        num_rows=is_whole * schedule.num_rows + dropped.any() * num_copied,
        is_free=~is_issued | is_landing | is_due,
    )


def prefetch_by_schedule(
    cache: Cache,
    access: Access,
    probability: Float[Array, "depth experts"],
    shape: CacheShape,
    schedule: PrefetchSchedule,
    is_free: Bool[Array, ""],
) -> tuple[Cache, Int[Array, " depth"], Int[Array, " depth"]]:
    """Issues the prefetch that is expected to hide most of a copy, if none is under way.

    Returns:
      The cache, and for each layer ahead what was issued and what that evicted in vain.
    """
    ahead = _layers_ahead(access, shape)
    resident, score, fresh = cache.resident[ahead], cache.score[ahead], cache.fresh[ahead]
    victim, lost, has_room = _room(resident, score, access, probability)
    # What is hidden, in shares of a copy as whole numbers: a quotient is not the same everywhere.
    num_hidden = jnp.minimum(jnp.arange(1, shape.depth + 1), schedule.layers_per_copy)
    chance = probability - lost[:, None] - PREFETCH_PRICE_RATIO
    chance = jnp.floor(CHANCE_STEPS * chance + 0.5)
    gain = num_hidden.astype(jnp.float32)[:, None] * chance
    gain = jnp.where(~resident & has_room[:, None], gain, -jnp.inf)
    best = _first_best(gain)
    row, expert = best // shape.num_experts, best % shape.num_experts
    is_issued = is_free & (gain[row, expert] > 0)
    entering, leaving = _change(shape, row, expert, victim[row], is_issued)
    layer = ahead[row]
    cache = cache._replace(
        resident=cache.resident.at[ahead].set((resident & ~leaving) | entering),
        score=cache.score.at[ahead].set(jnp.where(entering, jnp.inf, score)),
        fresh=cache.fresh.at[ahead].set((fresh & ~leaving) | entering),
        wire_layer=jnp.where(is_issued, layer, cache.wire_layer),
        wire_expert=jnp.where(is_issued, expert.astype(jnp.int32), cache.wire_expert),
        wire_event=jnp.where(
            is_issued, access.event, jnp.where(is_free, NEVER, cache.wire_event)
        ).astype(jnp.int32),
    )
    return cache, entering.sum(-1), (leaving & fresh).sum(-1)


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


def prefetch_by_clock(
    cache: Cache,
    access: Access,
    probability: Float[Array, "depth experts"],
    clock: LayerClock,
    shape: CacheShape,
    gap_s: Float[Array, ""],
) -> tuple[Cache, Int[Array, " depth"], Int[Array, " depth"]]:
    """Issues the prefetches that start before the next demand is known and pay for themselves.

    Returns:
      The cache, and for each layer ahead what was issued and what that evicted in vain.
    """
    ahead = _layers_ahead(access, shape)
    copy_s = clock.copy_s[ahead]

    def look(queue: _Queue) -> _Queue:
        """Finds the next prefetch and what it gains; no gain ends the queue."""
        victim, lost, has_room = _room(queue.resident, queue.score, access, probability)
        gain = _price(probability, lost[:, None], copy_s[:, None], queue.link_free_s, gap_s)
        wanted = ~queue.resident & has_room[:, None] & (probability > 0)
        gain = jnp.where(wanted, gain, -jnp.inf)
        best = _first_best(gain)
        row, expert = best // shape.num_experts, best % shape.num_experts
        return queue._replace(
            gain=gain[row, expert], choice=jnp.stack([row, expert]), victim=victim[row]
        )

    def issue(queue: _Queue) -> _Queue:
        row, expert = queue.choice
        entering, leaving = _change(shape, row, expert, queue.victim, jnp.ones((), bool))
        return look(
            queue._replace(
                resident=(queue.resident & ~leaving) | entering,
                score=jnp.where(entering, jnp.inf, queue.score),
                fresh=(queue.fresh & ~leaving) | entering,
                link_free_s=queue.link_free_s + copy_s[row],
                num_issued=queue.num_issued + entering.any(-1),
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
        lambda queue: (queue.gain > 0) & (queue.num_issued.sum() < MAX_PREFETCHES), issue, queue
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


def _layers_ahead(access: Access, shape: CacheShape) -> Int[Array, " depth"]:
    return (access.layer + 1 + jnp.arange(shape.depth)) % shape.num_layers


def _room(
    resident: Bool[Array, "depth experts"],
    score: Float[Array, "depth experts"],
    access: Access,
    probability: Float[Array, "depth experts"],
) -> tuple[Int[Array, " depth"], Float[Array, " depth"], Bool[Array, " depth"]]:
    """Who makes room in each layer (-1: nobody needs to), how probable that one is, if any can."""
    is_full = resident.sum(-1) >= access.capacity_ahead
    victim = worst(score, resident)
    rows = jnp.arange(len(resident))
    lost = jnp.where(is_full, probability[rows, victim], 0.0)
    # A full layer whose worst expert is itself a waiting prefetch has no room.
    has_room = ~is_full | (score[rows, victim] < jnp.inf)
    return jnp.where(is_full, victim, -1), lost, has_room & (access.capacity_ahead > 0)


def _first_best(gain: Float[Array, "depth experts"]) -> Int[Array, ""]:
    """`argmax` in two reductions; the one of pairs takes a CPU three times as long."""
    index = jnp.arange(gain.size, dtype=jnp.int32).reshape(gain.shape)
    return jnp.where(gain == gain.max(), index, gain.size).min()


def _change(
    shape: CacheShape, row, expert, victim, is_issued
) -> tuple[Bool[Array, "depth experts"], Bool[Array, "depth experts"]]:
    """Who enters and who leaves the layers ahead."""
    index = jnp.arange(shape.num_experts)
    here = ((jnp.arange(shape.depth) == row) & is_issued)[:, None]
    return here & (index == expert)[None, :], here & (index == victim)[None, :]


def _price(probability, lost, copy_s, link_free_s, gap_s):
    """Stall expected to be saved, less link time expected to be wasted; -inf if too late to start.

    A copy that is used saves `copy_s`, less the chance that its victim is demanded instead; one
    that is not used wastes `copy_s`; and what overruns the next demand delays it either way.
    """
    overrun_s = jnp.maximum(link_free_s + copy_s - gap_s, 0.0)
    gain_s = (probability - lost) * copy_s - (1.0 - probability) * copy_s - overrun_s
    return jnp.where(link_free_s < gap_s, gain_s, -jnp.inf)
