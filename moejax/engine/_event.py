"""One event on the device: what the strategy may see, what it decides, and what that moves.

Tables are arrays or references to arrays in a kernel: both are read by `table[index]`. What is
written is returned, and the caller puts it where it belongs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from moejax.strategies import NEVER, Access, CacheShape, Decision, Future, Strategy

from ._directory import (
    Ahead,
    Choice,
    Demand,
    Settled,
    choose_prefetch,
    reserve,
    settle_layer,
    settle_pool,
)
from .kernels._copy import EXPERT, ISSUED, LAYER, NUM_FIELDS, SLOT, VALID, Schedule

COUNTS = ("demands", "hits", "late", "misses", "prefetches", "fetched_rows")
"""What is counted of each event; a late expert and a miss each fetch all their rows in the end."""

NUM_COUNTS = 8
PREFETCHES = COUNTS.index("prefetches")


class Sizes(NamedTuple):
    """What the programs of an offloaded model are compiled for, besides the batch.

    Attributes:
      shape: Layers, experts of this device (without padding), experts of a token, and how far
        ahead to prefetch.
      num_padded: Experts of a layer with padding: a power of two, at least 16.
      num_choices: Experts of a layer that the router chooses from, those of all devices.
      num_devices: Devices that they are dealt out among.
      scope: `layer` or `pool`.
      num_rows: Rows of one packed expert.
      lookahead_width: How many experts each of the next gates names.
      schedule: When rows of a prefetched expert are copied; None prefetches nothing.
      asks_gates: Whether the strategy wants to know what the next gates say.
      reads_future: Whether it reads the future, which only a replay has.
    """

    shape: CacheShape
    num_padded: int
    num_choices: int
    num_devices: int
    scope: str
    num_rows: int
    lookahead_width: int
    schedule: Schedule | None
    asks_gates: bool
    reads_future: bool


class Tables(NamedTuple):
    """The directory of all layers and what is remembered of their last events.

    Attributes:
      slot_of: Slot of each expert; layers that pad their number have none.
      score: What the strategy gave it at its layer's last event; infinite for a prefetch.
      demand: Tokens that demanded it in this step and in the one before: the layers of even steps,
        then those of odd steps.
      resident: Whether it was in a slot when its layer's last event came, as 0 or 1.
      said: What the next gates said then, as `Access.lookahead`; nothing where nobody asks.
      first_slot: First slot of each layer.
      num_slots: Slots of each layer; of a pool, all.
      is_taken: Of a pool, 1 for each slot that is not free.
      job: The prefetch under way, see `kernels._copy`.
      counts: `COUNTS` of each layer's last event.
      step: Number of the step.
      device: Number of this device among several; None for one.
      state: The strategy's state of all layers; booleans are kept as int32.
    """

    slot_of: Int32[Array, "padded_layers experts"]
    score: Float[Array, "padded_layers experts"]
    demand: Int32[Array, "two_layers experts"]
    resident: Int32[Array, "layers experts"]
    said: Float[Array, "asking_layers depth experts"]
    first_slot: Int32[Array, " layers"]
    num_slots: Int32[Array, " layers"]
    is_taken: Int32[Array, " slots"]
    job: Int32[Array, " fields"]
    counts: Int32[Array, "layers counts"]
    step: Int32[Array, " 1"]
    device: Int32[Array, " 1"] | None
    state: Any


class ReplayTable(NamedTuple):
    """Recorded routing that overrides the router, step after step, and then from the start.

    Attributes:
      experts: Experts of each request, in the router's order; a number beyond the last is none.
      demand: Tokens that demand each expert of this device, event by event, and of the `depth`
        events beyond.
      next_use: Event at which each is demanded next, likewise.
      lookahead: What the next gates said, 0 to 1, as `Access.lookahead`; None if nothing.
    """

    experts: Int32[Array, "steps layers topk batch"]
    demand: Int32[Array, "events experts"]
    next_use: Int32[Array, "events experts"]
    lookahead: Float[Array, "steps layers depth experts"] | None


class Served(NamedTuple):
    """What the first half of an event decides: all that the experts wait for.

    Attributes:
      settled: Where the layer's experts are read from, and where they are afterwards.
      slot_of: With a pool, that of all layers; None where layers have slots of their own.
      is_taken: With a pool, the slots that are not free.
      score: What the strategy gave the layer's experts.
      landed_rows: Leading rows of each demanded expert that lie in its slot.
      counts: As `COUNTS`, but without prefetches.
      is_live: Whether the prefetch under way goes on.
    """

    settled: Settled
    slot_of: Int32[Array, "layers experts"] | None
    is_taken: Int32[Array, " slots"] | None
    score: Float[Array, " experts"]
    landed_rows: Int32[Array, " experts"]
    counts: Int32[Array, " counts"]
    is_live: Bool[Array, ""]


class Issued(NamedTuple):
    """What the second half decides, in the shadow of the experts.

    Attributes:
      choice: The prefetch to issue.
      target: Layer that it is for.
      slot: Slot that it gets.
      slot_of: `slot_of` of that layer.
      score: `score` of that layer.
      job: The prefetch under way at the next event.
    """

    choice: Choice
    target: Int32[Array, ""]
    slot: Int32[Array, ""]
    slot_of: Int32[Array, " experts"]
    score: Float[Array, " experts"]
    job: Int32[Array, " fields"]


def read_access(
    sizes: Sizes,
    tables: Tables,
    replay: ReplayTable | None,
    layer: Int[Array, ""],
    demand: Int32[Array, " experts"],
    resident: Bool[Array, " experts"],
    lookahead: Float[Array, "depth experts"] | None,
) -> Access:
    """The event as a strategy may see it; see `moejax.strategies.Access`."""
    layers, depth = sizes.shape.num_layers, sizes.shape.depth
    event = tables.step[0] * layers + layer
    further = jax.lax.iota(jnp.int32, depth)
    ahead = (layer + 1 + further) % layers
    if lookahead is None:
        lookahead = jnp.zeros((depth, sizes.num_padded), jnp.float32)
    return Access(
        event=event,
        layer=layer,
        demand=demand,
        above=tables.demand[demand_row(sizes, tables, layer - 1), :],
        below_before=tables.demand[demand_row(sizes, tables, layer + 1 + further - layers), :],
        resident=resident,
        resident_ahead=tables.slot_of[ahead, :] >= 0,
        capacity=tables.num_slots[layer],
        capacity_ahead=tables.num_slots[ahead],
        lookahead=lookahead,
        future=_future(sizes, replay, event),
    )


def serve(strategy: Strategy, sizes: Sizes, tables: Tables, access: Access, state: Any) -> Served:
    """The first half of an event: who is hit, who is missed, and which slots are taken."""
    _, decision = strategy.step(state, access, None)
    is_demanded = access.demand > 0
    score, may_stay = _scores(decision, is_demanded)
    number = jax.lax.iota(jnp.int32, sizes.num_padded)
    job = _Job.read(tables, sizes, access.event, access.layer)
    is_flying = (number == job.expert) & job.is_due & ~job.has_landed
    demand = Demand(is_demanded, score, may_stay, is_demanded & is_flying, is_flying & ~is_demanded)
    slot_of = is_taken = None
    if sizes.scope == "layer":
        settled = settle_layer(
            demand,
            tables.slot_of[access.layer, :],
            tables.first_slot[access.layer],
            access.capacity,
        )
    else:
        settled, slot_of, is_taken = settle_pool(
            demand,
            tables.slot_of[:, :],
            tables.score[:, :],
            tables.is_taken[:],
            access.layer,
            access.capacity,
        )
    landed_rows = jnp.where(settled.is_hit, sizes.num_rows, 0)
    landed_rows = jnp.where(demand.is_late, job.num_copied_rows, landed_rows)
    num = [_count(x) for x in (is_demanded, settled.is_hit, demand.is_late, settled.is_miss)]
    num_rows = (num[2] + num[3]) * sizes.num_rows
    num_rows += _count(demand.is_dropped) * job.num_copied_rows
    num_rows += job.is_landing.astype(jnp.int32) * sizes.num_rows
    counts = _row(NUM_COUNTS, [*num, num_rows - num_rows, num_rows])
    is_live = job.is_valid & ~job.is_due & ~job.has_landed
    return Served(settled, slot_of, is_taken, score, landed_rows, counts, is_live)


def issue(strategy: Strategy, sizes: Sizes, tables: Tables, access: Access, state: Any) -> Issued:
    """The second half of an event: what to prefetch; only for a strategy that does."""
    _, decision = strategy.step(state, access, None)
    assert decision.prefetch_probability is not None
    assert sizes.schedule is not None
    layers, depth = sizes.shape.num_layers, sizes.shape.depth
    rows = (access.layer + 1 + jax.lax.iota(jnp.int32, depth)) % layers
    ahead = Ahead(tables.slot_of[rows, :], tables.score[rows, :], access.capacity_ahead)
    copied_layers = sizes.schedule.layers_per_copy
    choice = choose_prefetch(ahead, decision.prefetch_probability, copied_layers)
    job = _Job.read(tables, sizes, access.event, access.layer)
    is_free = ~job.is_valid | job.is_due | job.has_landed
    choice = choice._replace(is_issued=choice.is_issued & is_free)
    target = (access.layer + 1 + choice.row) % layers
    before = tables.slot_of[target, :]
    slot, after = reserve(choice, before, tables.first_slot[target])
    score = tables.score[target, :]
    is_new = jax.lax.iota(jnp.int32, sizes.num_padded) == choice.expert
    fresh = _row(NUM_FIELDS, [target, choice.expert, slot, access.event, 1])
    going_on = _row(
        NUM_FIELDS,
        [job.layer, job.expert, job.slot, job.issued, job.valid * jnp.logical_not(is_free)],
    )
    return Issued(
        choice,
        target,
        slot,
        jnp.where(choice.is_issued, after, before),
        jnp.where(choice.is_issued & is_new, jnp.inf, score),
        jnp.where(choice.is_issued, fresh, going_on),
    )


def is_link_free(sizes: Sizes, tables: Tables, layer: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a prefetch may be issued after the event of a layer: one is under way at most."""
    event = tables.step[0] * sizes.shape.num_layers + layer
    job = _Job.read(tables, sizes, event, layer)
    return ~job.is_valid | job.is_due | job.has_landed


def remember(
    strategy: Strategy,
    sizes: Sizes,
    tables: Tables,
    replay: ReplayTable | None,
    layer: Int[Array, ""],
    state: Any,
) -> Any:
    """The strategy's state of one layer after the step, all of whose events are over."""
    demand = tables.demand[demand_row(sizes, tables, layer), :]
    said = tables.said[layer, :, :] if sizes.asks_gates else None
    resident = tables.resident[layer, :] > 0
    access = read_access(sizes, tables, replay, layer, demand, resident, said)
    return strategy.step(state, access, None)[0]


def demand_row(sizes: Sizes, tables: Tables, layer: Int[Array, "*rows"]) -> Int[Array, "*rows"]:
    """Row of `Tables.demand` of a layer of this step, or if negative of the step before."""
    layers = sizes.shape.num_layers
    is_before = layer < 0
    odd = (tables.step[0] + is_before.astype(jnp.int32)) % 2
    return odd * layers + layer + layers * is_before.astype(jnp.int32)


class _Job(NamedTuple):
    """The prefetch under way, as it stands when an event's demand is known.

    Attributes:
      is_due: Whether it is for this very event.
      has_landed: Whether all its rows are there.
      is_landing: Whether the last of them came just before this event.
      num_copied_rows: Rows that will have been copied when the experts are computed.
    """

    layer: Int32[Array, ""]
    expert: Int32[Array, ""]
    slot: Int32[Array, ""]
    issued: Int32[Array, ""]
    valid: Int32[Array, ""]
    is_valid: Bool[Array, ""]
    is_due: Bool[Array, ""]
    has_landed: Bool[Array, ""]
    is_landing: Bool[Array, ""]
    num_copied_rows: Int32[Array, ""]

    @classmethod
    def read(
        cls, tables: Tables, sizes: Sizes, event: Int[Array, ""], at: Int[Array, ""]
    ) -> "_Job":
        layer, expert, slot, issued, valid = (
            tables.job[field] for field in (LAYER, EXPERT, SLOT, ISSUED, VALID)
        )
        is_valid = valid > 0
        if sizes.schedule is None:
            never = valid < 0
            return cls(layer, expert, slot, issued, valid, never, never, never, never, valid)
        num_layers = event - issued
        copied = (num_layers - 1) * sizes.schedule.rows_per_event
        copied = copied + sizes.schedule.rows_before_experts
        return cls(
            layer,
            expert,
            slot,
            issued,
            valid,
            is_valid=is_valid,
            is_due=is_valid & (layer == at),
            has_landed=num_layers >= sizes.schedule.layers_per_copy,
            is_landing=is_valid & (num_layers == sizes.schedule.layers_per_copy),
            num_copied_rows=jnp.clip(copied, 0, sizes.num_rows),
        )


def _scores(
    decision: Decision, is_demanded: Bool[Array, " experts"]
) -> tuple[Float[Array, " experts"], Bool[Array, " experts"]]:
    score = decision.keep_score.astype(jnp.float32)
    everyone = is_demanded | ~is_demanded
    return score, everyone if decision.admit is None else decision.admit


def _future(sizes: Sizes, replay: ReplayTable | None, event: Int[Array, ""]) -> Future:
    depth, experts = sizes.shape.depth, sizes.num_padded
    if replay is None or not sizes.reads_future:
        never = jnp.full((depth, experts), NEVER, jnp.int32)
        return Future(jnp.full((experts,), NEVER, jnp.int32), jnp.zeros_like(never), never)
    # The replay begins again behind its last event.
    event = event % (replay.next_use.shape[0] - depth)
    coming = event + 1 + jax.lax.iota(jnp.int32, depth)
    return Future(replay.next_use[event, :], replay.demand[coming, :], replay.next_use[coming, :])


def _row(size: int, entries: list[Any]) -> Int32[Array, " entries"]:
    """A row of numbers, made without joining arrays."""
    number = jax.lax.iota(jnp.int32, size)
    row = jnp.zeros((size,), jnp.int32)
    for place, entry in enumerate(entries):
        row = jnp.where(number == place, entry, row)
    return row


def _count(members: Bool[Array, " entries"]) -> Int32[Array, ""]:
    return members.astype(jnp.int32).sum(dtype=jnp.int32)
