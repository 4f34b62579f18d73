"""The directory against the same rules written down with sets, in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine._directory import (
    NOWHERE,
    Ahead,
    Demand,
    choose_prefetch,
    reserve,
    settle_layer,
    settle_pool,
)

EXPERTS, LAYERS, FIRST_SLOT = 16, 4, 5
NUM_EVENTS = 120


def draw_demand(rng: np.random.Generator, slot_of: np.ndarray) -> Demand:
    """A demand of 0 to 9 experts; few different scores, so that many are equal."""
    is_demanded = np.zeros(EXPERTS, bool)
    is_demanded[rng.choice(EXPERTS, rng.integers(0, 10), replace=False)] = True
    score = rng.integers(-3, 4, EXPERTS).astype(np.float32)
    score[rng.random(EXPERTS) < 0.05] = np.inf
    may_stay = rng.random(EXPERTS) < rng.choice([0.5, 1.0])
    flying = np.zeros(EXPERTS, bool)
    residents = np.flatnonzero(slot_of >= 0)
    if residents.size and rng.random() < 0.5:
        flying[rng.choice(residents)] = True
    return Demand(is_demanded, score, may_stay, flying & is_demanded, flying & ~is_demanded)


def plain_layer(demand: Demand, slot_of: np.ndarray, slots: range) -> dict[str, np.ndarray]:
    holds = {e: int(slot_of[e]) for e in range(EXPERTS) if slot_of[e] >= 0}
    resident = {e for e in holds if not demand.is_dropped[e]}
    demanded = set(np.flatnonzero(demand.is_demanded).tolist())
    candidates = [e for e in resident | demanded if demand.may_stay[e]]
    kept = set(sorted(candidates, key=lambda e: (-demand.score[e], e))[: len(slots)])
    after = {e: holds[e] for e in kept & resident}
    return plain_settled(demand, holds, resident, kept, after, slots)


def plain_settled(demand, holds, resident, kept, after, free_slots) -> dict[str, np.ndarray]:
    """Who enters gets a free slot, one that is still read from last of all."""
    demanded = set(np.flatnonzero(demand.is_demanded).tolist())
    readers = {holds[e]: e for e in (resident - kept) & demanded}
    free = sorted(set(free_slots) - set(after.values()), key=lambda slot: (slot in readers, slot))
    entering = sorted(kept - resident)
    after = after | dict(zip(entering, free, strict=False))
    reads = {e: after[e] if e in entering else holds[e] for e in resident | set(entering)}
    partner = {e: readers[after[e]] for e in entering if after[e] in readers}

    def row(values: dict[int, int], filling: int) -> np.ndarray:
        return np.array([values.get(e, filling) for e in range(EXPERTS)])

    def members(chosen: set[int]) -> np.ndarray:
        return np.isin(np.arange(EXPERTS), list(chosen))

    return {
        "slot_of": row(after, NOWHERE),
        "read_slot": row(reads, 0),
        "is_hit": members(demanded & resident) & ~demand.is_late,
        "is_miss": members(demanded - resident),
        "is_written": members(demanded & kept),
        "partner": row(partner, NOWHERE),
        "is_partner": members(set(partner.values())),
    }


def check_invariants(settled, demand: Demand, before: np.ndarray, free_before: set[int]):
    """Holds whatever the rule is: no slot is shared, and nothing is overwritten unread."""
    held = settled.slot_of[settled.slot_of >= 0]
    assert len(set(held.tolist())) == held.size
    entering = np.flatnonzero((settled.slot_of >= 0) & (before != settled.slot_of))
    read_from = {int(before[e]): e for e in np.flatnonzero(settled.is_hit | demand.is_late)}
    given = {int(settled.slot_of[e]) for e in entering}
    for expert in entering:
        slot = int(settled.slot_of[expert])
        reader = read_from.get(slot, NOWHERE)
        assert settled.partner[expert] == reader
        if reader != NOWHERE:
            assert settled.slot_of[reader] == NOWHERE
            assert settled.is_partner[reader]
            assert free_before - set(held.tolist()) <= given, "a free slot was left"
    np.testing.assert_array_equal(
        settled.is_hit.astype(int) + settled.is_miss + demand.is_late, demand.is_demanded
    )


@pytest.mark.parametrize("num_slots", [0, 1, 3, 6, 11, EXPERTS])
def test_a_layer_equals_plain_python(num_slots):
    rng = np.random.default_rng(num_slots)
    slots = range(FIRST_SLOT, FIRST_SLOT + num_slots)
    slot_of = np.full(EXPERTS, NOWHERE, np.int32)
    settle = jax.jit(settle_layer)
    num_partners = 0
    for event in range(NUM_EVENTS):
        demand = draw_demand(rng, slot_of)
        arguments = (demand, jnp.asarray(slot_of), jnp.int32(FIRST_SLOT), jnp.int32(num_slots))
        found = jax.device_get(settle(*jax.tree.map(jnp.asarray, arguments)))
        for name, expected in plain_layer(demand, slot_of, slots).items():
            np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)
        free = set(slots) - set(slot_of[~demand.is_dropped].tolist())
        check_invariants(found, demand, np.where(demand.is_dropped, NOWHERE, slot_of), free)
        assert set(found.slot_of.tolist()) <= {NOWHERE, *slots}
        if event < 2:
            eager = settle_layer(*jax.tree.map(jnp.asarray, arguments))
            jax.tree.map(np.testing.assert_array_equal, eager, found)
        num_partners += found.is_partner.sum()
        slot_of = found.slot_of
    # The case that is easy to get wrong must have come up where it can.
    assert (num_partners > 0) == (0 < num_slots < EXPERTS)


def test_below_the_demand_the_rest_streams_past():
    """Six demanded, two slots: the best two are written through, four are in no slot."""
    is_demanded = np.arange(EXPERTS) < 6
    score = np.where(np.isin(np.arange(EXPERTS), [2, 5]), 1.0, 0.0).astype(np.float32)
    nobody = np.zeros(EXPERTS, bool)
    demand = Demand(is_demanded, score, ~nobody, nobody, nobody)
    empty = jnp.full(EXPERTS, NOWHERE, jnp.int32)
    settled = settle_layer(
        jax.tree.map(jnp.asarray, demand), empty, jnp.int32(FIRST_SLOT), jnp.int32(2)
    )
    assert np.flatnonzero(settled.is_written).tolist() == [2, 5]
    assert settled.slot_of[jnp.array([2, 5])].tolist() == [FIRST_SLOT, FIRST_SLOT + 1]
    assert np.flatnonzero(settled.is_miss).tolist() == list(range(6))


@pytest.mark.parametrize("num_slots", [1, 5, 19, 32, LAYERS * EXPERTS])
def test_a_pool_equals_plain_python(num_slots):
    rng = np.random.default_rng(num_slots)
    slot_of = np.full((LAYERS, EXPERTS), NOWHERE, np.int32)
    score = np.full((LAYERS, EXPERTS), -np.inf, np.float32)
    size = 1 << (num_slots - 1).bit_length()
    is_taken = (np.arange(size) >= num_slots).astype(np.int32)
    settle = jax.jit(settle_pool)
    num_elsewhere = num_partners = 0
    for event in range(NUM_EVENTS):
        layer = event % LAYERS
        nothing = np.full(EXPERTS, NOWHERE)
        demand = draw_demand(rng, nothing)
        arguments = jax.tree.map(
            jnp.asarray, (demand, slot_of, score, is_taken, np.int32(layer), np.int32(num_slots))
        )
        settled, after, taken = jax.device_get(settle(*arguments))
        score[layer] = demand.score
        expected, table = plain_pool(demand, slot_of, score, layer, num_slots)
        for name, wanted in expected.items():
            np.testing.assert_array_equal(getattr(settled, name), wanted, err_msg=name)
        np.testing.assert_array_equal(after, table)
        held = after[after >= 0]
        assert len(set(held.tolist())) == held.size <= num_slots
        np.testing.assert_array_equal(
            taken, np.isin(np.arange(size), held) | (np.arange(size) >= num_slots)
        )
        check_invariants(
            settled, demand, slot_of[layer], set(range(num_slots)) - set(slot_of.ravel().tolist())
        )
        if event == 1:
            eager = settle_pool(*arguments)
            jax.tree.map(np.testing.assert_array_equal, eager, (settled, after, taken))
        others = np.arange(LAYERS) != layer
        num_elsewhere += ((slot_of >= 0) & (after < 0))[others].sum()
        num_partners += settled.is_partner.sum()
        slot_of, is_taken = after, taken
    is_scarce = num_slots < LAYERS * EXPERTS
    assert (num_elsewhere > 0) == is_scarce
    assert num_partners > 0 or not is_scarce


def plain_pool(demand: Demand, slot_of, score, layer: int, num_slots: int):
    """The layer's event, and where every expert of every layer is after it."""
    holds = {
        (row, e): int(slot_of[row, e])
        for row in range(LAYERS)
        for e in range(EXPERTS)
        if slot_of[row, e] >= 0
    }
    mine = {e for row, e in holds if row == layer}
    barred = {e for e in mine if not demand.may_stay[e]}
    demanded = set(np.flatnonzero(demand.is_demanded).tolist())
    candidates = {key for key in holds if key[0] != layer or key[1] not in barred}
    candidates |= {(layer, e) for e in demanded if demand.may_stay[e]}
    ranked = sorted(candidates, key=lambda key: (-score[key], key))[:num_slots]
    after = {key: holds[key] for key in ranked if key in holds}
    kept = {e for row, e in ranked if row == layer}
    own = {e: slot for (row, e), slot in holds.items() if row == layer}
    stay = {e: slot for (row, e), slot in after.items() if row == layer}
    elsewhere = {slot for (row, _), slot in after.items() if row != layer}
    free = [slot for slot in range(num_slots) if slot not in elsewhere]
    settled = plain_settled(demand, own, mine, kept, stay, free)
    table = np.full((LAYERS, EXPERTS), NOWHERE)
    for key, slot in after.items():
        table[key] = slot
    table[layer] = settled["slot_of"]
    return settled, table


@pytest.mark.parametrize("layers_per_copy", [1, 3])
def test_a_prefetch_equals_plain_python(layers_per_copy):
    rng = np.random.default_rng(layers_per_copy)
    depth, num_issued, num_evicting = 4, 0, 0
    choose, take = jax.jit(choose_prefetch, static_argnums=2), jax.jit(reserve)
    for _ in range(200):
        num_slots = rng.integers(0, 8, depth)
        slot_of = np.full((depth, EXPERTS), NOWHERE, np.int32)
        for row, most in zip(slot_of, num_slots, strict=True):
            held = rng.choice(EXPERTS, rng.integers(max(0, most - 1), most + 1), replace=False)
            row[held] = FIRST_SLOT + rng.permutation(most)[: held.size]
        score = rng.integers(0, 4, (depth, EXPERTS)).astype(np.float32)
        score[rng.random(score.shape) < 0.2] = np.inf
        # Sixteenths are exact, so that ties are ties.
        probability = (rng.integers(0, 13, score.shape) / 16).astype(np.float32)
        ahead = Ahead(*map(jnp.asarray, (slot_of, score, num_slots.astype(np.int32))))
        choice = choose(ahead, jnp.asarray(probability), layers_per_copy)
        expected = plain_choice(slot_of, score, num_slots, probability, layers_per_copy)
        assert bool(choice.is_issued) == (expected is not None)
        if expected is None:
            continue
        assert (int(choice.row), int(choice.expert), int(choice.victim)) == expected
        row, expert, victim = expected
        slot, after = take(choice, jnp.asarray(slot_of[row]), jnp.int32(FIRST_SLOT))
        held = set(slot_of[row].tolist()) - {slot_of[row, victim] if victim >= 0 else NOWHERE}
        assert int(slot) not in held - {NOWHERE}
        assert FIRST_SLOT <= int(slot) < FIRST_SLOT + num_slots[row]
        moved = {expert: int(slot)} | ({victim: NOWHERE} if victim >= 0 else {})
        wanted = [moved.get(e, int(slot_of[row, e])) for e in range(EXPERTS)]
        assert after.tolist() == wanted
        num_issued += 1
        num_evicting += victim >= 0
    assert num_issued > num_evicting > 20


def plain_choice(slot_of, score, num_slots, probability, layers_per_copy):
    best, found = 0.0, None
    for row, chance in enumerate(probability):
        resident = np.flatnonzero(slot_of[row] >= 0).tolist()
        victim, lost = NOWHERE, 0.0
        if len(resident) >= num_slots[row]:
            ranked = sorted(resident, key=lambda e, row=row: (score[row, e], -e))
            if not ranked or score[row, ranked[0]] == np.inf:
                continue
            victim, lost = ranked[0], chance[ranked[0]]
        for expert in sorted(set(range(EXPERTS)) - set(resident)):
            steps = np.floor(128 * (chance[expert] - lost - 0.5) + 0.5)
            gain = min(row + 1, layers_per_copy) * steps
            if gain > best:
                best, found = gain, (row, expert, victim)
    return found
