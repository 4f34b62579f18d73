"""Which expert lies in which slot, and the rule that moves them: pure functions of one event.

The same functions run in the plain JAX program and, traced once more, inside a kernel of one
program. So they keep to what a GPU kernel can do: elementwise work, reductions and prefix sums on
arrays whose sides are powers of two. Experts are padded to such a side by experts that are never
demanded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from moejax.strategies import CHANCE_STEPS, PREFETCH_PRICE_RATIO, keep_best

NOWHERE = -1
_LAST = 2**30


class Demand(NamedTuple):
    """What one event asks of the directory, one entry an expert of the layer.

    Attributes:
      is_demanded: Whether a token needs the expert.
      score: What the strategy gives it after the event; higher is kept.
      may_stay: Whether the strategy admits it.
      is_late: Whether it is demanded while its prefetch is under way.
      is_dropped: Whether its prefetch is under way though nobody demanded it: it loses its slot.
    """

    is_demanded: Bool[Array, " experts"]
    score: Float[Array, " experts"]
    may_stay: Bool[Array, " experts"]
    is_late: Bool[Array, " experts"]
    is_dropped: Bool[Array, " experts"]


class Settled(NamedTuple):
    """Where the experts of the layer are computed from, and where they are afterwards.

    Attributes:
      slot_of: Slot of each expert after the event; `NOWHERE` for none.
      read_slot: Slot that a demanded expert is read from or written through into.
      is_hit: Demanded and in a slot, as a whole.
      is_miss: Demanded and in no slot.
      is_written: Its rows from host memory are written into `read_slot`.
      partner: Of an expert that takes the slot of another demanded one, the other's number.
      is_partner: Whether its slot is taken by an expert of this very event.
    """

    slot_of: Int32[Array, " experts"]
    read_slot: Int32[Array, " experts"]
    is_hit: Bool[Array, " experts"]
    is_miss: Bool[Array, " experts"]
    is_written: Bool[Array, " experts"]
    partner: Int32[Array, " experts"]
    is_partner: Bool[Array, " experts"]


def settle_layer(
    demand: Demand,
    slot_of: Int32[Array, " experts"],
    first_slot: Int[Array, ""],
    num_slots: Int[Array, ""],
) -> Settled:
    """Serves one event of a layer that has slots of its own.

    Args:
      demand: The event.
      slot_of: Slot of each expert before it.
      first_slot: The layer's first slot.
      num_slots: How many it has; at most as many as experts.
    """
    index = _index(slot_of)
    is_resident = (slot_of >= 0) & ~demand.is_dropped
    candidates = (is_resident | demand.is_demanded) & demand.may_stay
    is_kept = keep_best(demand.score, candidates, num_slots)
    is_entering, is_leaving = is_kept & ~is_resident, is_resident & ~is_kept
    # An expert can be read and lose its slot in one event; such slots are given away last.
    is_read = is_leaving & demand.is_demanded
    lies_in = (slot_of - first_slot)[:, None] == index[None, :]
    is_taken = (lies_in & is_kept[:, None] & is_resident[:, None]).sum(0) > 0
    is_read_from = (lies_in & is_read[:, None]).sum(0) > 0
    is_free = (index < num_slots) & ~is_taken
    is_quiet = is_free & ~is_read_from
    turn = jnp.where(is_quiet, _before(is_quiet), _count(is_quiet) + _before(is_free & ~is_quiet))
    gets = (is_entering[:, None] & is_free[None, :]) & (
        _before(is_entering)[:, None] == turn[None, :]
    )
    entered = first_slot + jnp.where(gets, index[None, :], 0).sum(1, dtype=jnp.int32)
    return _settled(demand, slot_of, is_resident, is_kept, entered)


def settle_pool(
    demand: Demand,
    slot_of: Int32[Array, "layers experts"],
    score: Float[Array, "layers experts"],
    is_taken: Int32[Array, " slots"],
    layer: Int[Array, ""],
    num_slots: Int[Array, ""],
) -> tuple[Settled, Int32[Array, "layers experts"], Int32[Array, " slots"]]:
    """Serves one event of a layer where all layers share the slots.

    Victims are found one by one, each a pass over all layers: as many as experts enter.

    Args:
      demand: The event.
      slot_of: Slot of each expert of every layer before it.
      score: Score of each at its layer's last event.
      is_taken: 1 for a slot that holds an expert or does not exist.
      layer: Layer of the event.
      num_slots: Slots of the pool.

    Returns:
      What happened in the layer, and the new `slot_of` and `is_taken`.
    """
    rows, experts = slot_of.shape
    number = _index(is_taken)
    mine = jax.lax.broadcasted_iota(jnp.int32, (rows, experts), 0) == layer
    flat = jax.lax.broadcasted_iota(jnp.int32, (rows, experts), 0) * experts
    flat = flat + jax.lax.broadcasted_iota(jnp.int32, (rows, experts), 1)
    before = jnp.where(mine, slot_of, 0).sum(0, dtype=jnp.int32)
    is_resident = before >= 0
    is_barred = is_resident & ~demand.may_stay
    wanted = is_resident | (demand.is_demanded & demand.may_stay)
    held = jnp.where(mine, wanted[None, :], slot_of >= 0).astype(jnp.int32)
    own_score = jnp.where(is_barred, -jnp.inf, demand.score)
    worth = jnp.where(mine, own_score[None, :], score)
    is_read = mine & (demand.is_demanded & is_resident)[None, :]
    num_leaving = jnp.maximum(held.sum() - num_slots, is_barred.astype(jnp.int32).sum())

    def evict(_, carry):
        held, taken = carry
        lowest = jnp.where(held > 0, worth, jnp.inf).min(1).min(0)
        is_lowest = (held > 0) & (worth == lowest)
        victim = flat == jnp.where(is_lowest, flat, -1).max(1).max(0)
        slot = jnp.where(victim, slot_of, 0).sum(1).sum(0)
        was_read = (victim & is_read).astype(jnp.int32).sum(1).sum(0)
        # 2 marks a slot that is still read from in this event: it is given away last.
        taken = jnp.where(number == slot, 2 * was_read, taken)
        return jnp.where(victim, 0, held), taken

    # A victim that never had a slot has `NOWHERE`, which is no slot's number.
    held, taken = jax.lax.fori_loop(0, jnp.maximum(num_leaving, 0), evict, (held, is_taken))
    is_kept = jnp.where(mine, held, 0).sum(0) > 0
    is_entering = is_kept & ~is_resident
    order = _before(is_entering)

    def enter(turn, carry):
        taken, entered = carry
        slot = jnp.where(taken == 0, number, jnp.where(taken == 2, _LAST + number, 2 * _LAST - 1))
        slot = slot.min(0) % _LAST
        entered = jnp.where(is_entering & (order == turn), slot, entered)
        return jnp.where(number == slot, 1, taken), entered

    nothing = jnp.zeros_like(before)
    taken, entered = jax.lax.fori_loop(0, _count(is_entering), enter, (taken, nothing))
    settled = _settled(demand, before, is_resident, is_kept, entered)
    elsewhere = jnp.where(held > 0, slot_of, NOWHERE)
    slot_of = jnp.where(mine, settled.slot_of[None, :], elsewhere)
    return settled, slot_of, jnp.where(taken == 1, 1, 0)


def _settled(demand, slot_of, is_resident, is_kept, entered) -> Settled:
    is_demanded = demand.is_demanded
    is_entering, is_leaving = is_kept & ~is_resident, is_resident & ~is_kept
    after = jnp.where(is_entering, entered, jnp.where(is_kept, slot_of, NOWHERE))
    clash = (is_entering[:, None] & (is_leaving & is_demanded)[None, :]) & (
        entered[:, None] == slot_of[None, :]
    )
    partner = jnp.where(clash, _index(slot_of)[None, :] + 1, 0).sum(1, dtype=jnp.int32) - 1
    read_slot = jnp.where(is_entering, entered, jnp.where(is_resident, slot_of, 0))
    return Settled(
        slot_of=after,
        read_slot=read_slot,
        is_hit=is_demanded & is_resident & ~demand.is_late,
        is_miss=is_demanded & ~is_resident,
        is_written=is_demanded & is_kept,
        partner=partner,
        is_partner=clash.sum(0) > 0,
    )


class Ahead(NamedTuple):
    """The next layers as a prefetch may find them; the first is the one right below.

    Attributes:
      slot_of: Slot of each expert.
      score: Score of each at its layer's last event.
      num_slots: Slots of each layer.
    """

    slot_of: Int32[Array, "depth experts"]
    score: Float[Array, "depth experts"]
    num_slots: Int32[Array, " depth"]


class Choice(NamedTuple):
    """The one prefetch worth issuing, if there is one.

    Attributes:
      is_issued: Whether there is.
      row: How many layers ahead of the next one.
      expert: Which expert.
      victim: The expert that makes room; `NOWHERE` where a slot is free.
    """

    is_issued: Bool[Array, ""]
    row: Int32[Array, ""]
    expert: Int32[Array, ""]
    victim: Int32[Array, ""]


def choose_prefetch(
    ahead: Ahead, probability: Float[Array, "depth experts"], layers_per_copy: int
) -> Choice:
    """The prefetch that is expected to hide most of a copy; see `moejax.simulate.timeline`.

    Args:
      ahead: What lies in the slots.
      probability: Chance of each expert to be demanded at its layer's next event.
      layers_per_copy: Layers in whose shadow one expert can be copied.
    """
    depth, experts = probability.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (depth, experts), 0)
    expert = jax.lax.broadcasted_iota(jnp.int32, (depth, experts), 1)
    is_resident = ahead.slot_of >= 0
    is_full = is_resident.astype(jnp.int32).sum(1) >= ahead.num_slots
    lowest = jnp.where(is_resident, ahead.score, jnp.inf).min(1)
    is_worst = is_resident & (ahead.score == lowest[:, None])
    victim = jnp.where(is_worst, expert, -1).max(1)
    lost = jnp.where(expert == victim[:, None], probability, 0.0).sum(1)
    lost = jnp.where(is_full, lost, 0.0)
    has_room = (~is_full | (lowest < jnp.inf)) & (ahead.num_slots > 0)
    # In shares of a copy as whole numbers, like the simulator: a quotient may round differently.
    hidden = jnp.minimum(row + 1, layers_per_copy).astype(jnp.float32)
    chance = probability - lost[:, None] - PREFETCH_PRICE_RATIO
    gain = hidden * jnp.floor(CHANCE_STEPS * chance + 0.5)
    is_wanted = ~is_resident & has_room[:, None] & (probability > 0)
    gain = jnp.where(is_wanted, gain, -jnp.inf)
    best = gain.max(1).max(0)
    flat = jnp.where(gain == best, row * experts + expert, _LAST).min(1).min(0)
    at = flat // experts
    here = jax.lax.iota(jnp.int32, depth) == at
    leaves = jnp.where(here & is_full, victim, 0).sum() + jnp.where(here & ~is_full, -1, 0).sum()
    return Choice(best > 0, at, flat % experts, leaves.astype(jnp.int32))


def reserve(
    choice: Choice, slot_of: Int32[Array, " experts"], first_slot: Int[Array, ""]
) -> tuple[Int32[Array, ""], Int32[Array, " experts"]]:
    """The slot that an issued prefetch gets, and its layer's `slot_of` with it."""
    index = _index(slot_of)
    held = jnp.where(index == choice.victim, slot_of, 0).sum(dtype=jnp.int32)
    is_taken = ((slot_of - first_slot)[:, None] == index[None, :]).sum(0) > 0
    free = first_slot + jnp.where(is_taken, _LAST, index).min(0)
    slot = jnp.where(choice.victim >= 0, held, free).astype(jnp.int32)
    slot_of = jnp.where(index == choice.victim, NOWHERE, slot_of)
    return slot, jnp.where(index == choice.expert, slot, slot_of)


def _index(row: Array) -> Int32[Array, " entries"]:
    return jax.lax.iota(jnp.int32, row.shape[0])


def _before(members: Bool[Array, " entries"]) -> Int32[Array, " entries"]:
    """How many members come before each entry."""
    ones = members.astype(jnp.int32)
    return jnp.cumsum(ones) - ones


def _count(members: Bool[Array, " entries"]) -> Int32[Array, ""]:
    return members.astype(jnp.int32).sum(dtype=jnp.int32)
