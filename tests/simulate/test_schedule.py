"""The fixed schedule against the same events written down with sets, in plain Python."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.simulate import PrefetchSchedule, replay, timeline
from moejax.simulate._replay import access_at, cache_shape, moments
from moejax.strategies import (
    STRATEGIES,
    Predictor,
    fifo,
    learn_profile,
    on_demand,
    with_prefetch,
)
from moejax.trace import Trace

KEY = jax.random.key(0)
NUM_STEPS, NUM_LAYERS, NUM_EXPERTS, TOPK, DEPTH = 60, 6, 12, 2, 4
# Unequal slots: none, fewer than an event demands, about half, all.
SLOTS = np.array([[0, 2, 5, 12, 1, 3], [2] * 6, [4, 6, 3, 5, 7, 4]], np.int32)
ROWS_PER_EVENT, ROWS_BEFORE = 40, 20


def schedule_of(layers_per_copy: int, depth: int = DEPTH) -> PrefetchSchedule:
    num_rows = (layers_per_copy - 1) * ROWS_PER_EVENT + ROWS_BEFORE
    return PrefetchSchedule(layers_per_copy, depth, num_rows, ROWS_PER_EVENT, ROWS_BEFORE)


def make_trace(seed: int, num_tokens: int = NUM_STEPS) -> Trace:
    """Layers that mostly lead to one another, and gates that mostly know."""
    rng = np.random.default_rng(seed)
    experts = np.zeros((num_tokens * NUM_LAYERS, TOPK), np.uint8)
    pair = 0
    for event in range(len(experts)):
        follows = (pair * 5 + 1 + event % NUM_LAYERS) % (NUM_EXPERTS // 2)
        pair = follows if rng.random() < 0.93 else rng.integers(NUM_EXPERTS // 2)
        experts[event] = [2 * pair, 2 * pair + 1]
    ahead = np.stack([np.roll(experts, -1 - d, axis=0) for d in range(DEPTH)], axis=1)
    wrong = rng.random(ahead.shape) < 0.15
    said = np.where(wrong, rng.integers(0, NUM_EXPERTS, ahead.shape), ahead)
    lanes = (num_tokens, NUM_LAYERS)
    return Trace(
        experts=experts.reshape(*lanes, TOPK),
        num_experts=NUM_EXPERTS,
        request_start=np.array([0, num_tokens], np.int64),
        lookahead=said.reshape(*lanes, DEPTH, TOPK).astype(np.uint8),
    )


TRACE, PROFILE = make_trace(1), learn_profile(make_trace(2, 300))


def lane_of(trace: Trace):
    assert trace.lookahead is not None
    return replay(trace.experts, NUM_EXPERTS, lookahead=trace.lookahead[:, :, :, None])


def alternating() -> Predictor:
    """Names other experts at every event, for every layer ahead: most of them in vain."""

    def step(state, access):
        rows, experts = jnp.arange(DEPTH)[:, None], jnp.arange(NUM_EXPERTS)[None, :]
        # Sixteenths are exact, so that ties are ties in every program.
        sure = (access.event * 7 + rows * 3 + experts * 5) % 13
        return state, sure.astype(jnp.float32) / 16

    return Predictor(lambda shape: jnp.zeros(shape.num_layers), step, DEPTH)


BUILT = {
    name: kind.make(PROFILE)
    for name, kind in STRATEGIES.items()
    if name == "lru" or kind.make(PROFILE).prefetches
} | {
    "wrong fifo": with_prefetch(fifo(), alternating()),
    "wrong on_demand": with_prefetch(on_demand(), alternating()),
}


class Flight(NamedTuple):
    """A prefetch under way."""

    layer: int
    expert: int
    issued: int


def plain_schedule(strategy, lane, slots, schedule, copy_s, start=None):
    """Counts and waits of every event, with sets and dictionaries."""
    shape = cache_shape(lane.demand, TOPK, schedule.depth)
    state = [
        jax.tree.map(lambda leaf, i=i: leaf[i], strategy.init(shape)) for i in range(NUM_LAYERS)
    ]
    steps = moments(jax.tree.map(jnp.asarray, lane))

    @jax.jit
    def decide(state, step, layer, resident):
        moment = jax.tree.map(lambda leaf: leaf[step], steps)
        access = access_at(moment, layer, shape, resident, jnp.asarray(slots))
        return strategy.step(state, access, KEY)

    resident = [set(np.flatnonzero(row).tolist()) for row in start] if start is not None else None
    resident = resident or [set() for _ in range(NUM_LAYERS)]
    worth = [dict.fromkeys(range(NUM_EXPERTS), -np.inf) for _ in range(NUM_LAYERS)]
    unused = [set() for _ in range(NUM_LAYERS)]
    flight, events = None, []
    for event in range(len(lane.demand) * NUM_LAYERS):
        step, layer = divmod(event, NUM_LAYERS)
        demanded = set(np.flatnonzero(lane.demand[step, layer]).tolist())
        table = np.array([[e in row for e in range(NUM_EXPERTS)] for row in resident])
        state[layer], decision = decide(state[layer], step, layer, table)
        num_rows, late, wait_s, dropped = 0, set(), 0.0, set()
        if flight is not None:
            age = event - flight.issued
            copied = min((age - 1) * ROWS_PER_EVENT + ROWS_BEFORE, schedule.num_rows)
            if age == schedule.layers_per_copy:
                num_rows, flight = schedule.num_rows, None
            elif flight.layer == layer and flight.expert in demanded:
                late, num_rows, flight = {flight.expert}, schedule.num_rows, None
                wait_s = (1 - copied / schedule.num_rows) * copy_s[layer]
            elif flight.layer == layer:
                dropped, num_rows, flight = {flight.expert}, copied, None
        misses = demanded - resident[layer]
        hits = demanded - misses - late
        num_rows += len(misses) * schedule.num_rows
        wait_s += len(misses) * copy_s[layer]

        score = np.asarray(decision.keep_score, np.float32)
        admit = range(NUM_EXPERTS) if decision.admit is None else np.flatnonzero(decision.admit)
        candidates = ((resident[layer] | demanded) - dropped) & set(admit)
        order = sorted(candidates, key=lambda e: (-score[e], e))
        resident[layer] = set(order[: slots[layer]])
        worth[layer] = dict(enumerate(score))
        wasted = [len(unused[layer] - demanded - resident[layer])] + [0] * schedule.depth
        useful = len(unused[layer] & demanded)
        unused[layer] = (unused[layer] - demanded) & resident[layer]
        num_resident = len(resident[layer])

        issued, best = [0] * schedule.depth, (np.float32(0), None, None, None)
        chance = decision.prefetch_probability
        for d, row in enumerate([] if chance is None or flight else np.asarray(chance)):
            target = (layer + 1 + d) % NUM_LAYERS
            victim, lost = None, np.float32(0)
            if len(resident[target]) >= slots[target]:
                ranked = sorted(resident[target], key=lambda e: (worth[target][e], -e))
                if not ranked or worth[target][ranked[0]] == np.inf:
                    continue
                victim, lost = ranked[0], row[ranked[0]]
            hidden = np.float32(min(d + 1, schedule.layers_per_copy))
            for expert in sorted(set(range(NUM_EXPERTS)) - resident[target]):
                chance = row[expert] - lost - np.float32(0.5)
                gain = hidden * np.floor(np.float32(128) * chance + np.float32(0.5))
                if gain > best[0]:
                    best = (gain, d, expert, victim)
        _, d, expert, victim = best
        if d is not None:
            target = (layer + 1 + d) % NUM_LAYERS
            issued[d] = 1
            wasted[1 + d] = int(victim in unused[target])
            unused[target] = (unused[target] - {victim}) | {expert}
            resident[target] = (resident[target] - {victim}) | {expert}
            worth[target][expert] = np.inf
            flight = Flight(target, expert, event)
        events.append(
            {
                "num_demands": len(demanded),
                "num_hits": len(hits),
                "num_late": len(late),
                "num_misses": len(misses),
                "num_fetched_rows": num_rows,
                "num_prefetches": issued,
                "num_useful": useful,
                "num_wasted": wasted,
                "num_resident": num_resident,
                "stall_s": wait_s,
            }
        )
    return {
        name: np.array([one[name] for one in events]).reshape(
            len(lane.demand), NUM_LAYERS, *np.shape(events[0][name])
        )
        for name in events[0]
    }


def check(record, plain):
    for name, expected in plain.items():
        if name == "stall_s":
            np.testing.assert_allclose(record.stall_s, expected, rtol=1e-5, atol=1e-12)
        else:
            np.testing.assert_array_equal(getattr(record, name), expected, err_msg=name)


@pytest.fixture
def clock(round_clock):
    return round_clock(
        NUM_LAYERS, copy_s=np.array([5e-6, 3e-6, 8e-6, 1e-6, 4e-6, 2e-6]), overlap_ratio=0.0
    )


@pytest.mark.parametrize("name", BUILT)
def test_the_schedule_equals_plain_python(name, clock, run_timeline):
    strategy, lane, schedule = BUILT[name], lane_of(TRACE), schedule_of(3)
    found = run_timeline(strategy, lane, clock, SLOTS, topk=TOPK, schedule=schedule)
    for i, slots in enumerate(SLOTS):
        plain = plain_schedule(strategy, lane, slots, schedule, np.asarray(clock.copy_s))
        check(jax.tree.map(lambda leaf, i=i: leaf[i], found), plain)
    np.testing.assert_array_equal(
        found.num_hits + found.num_late + found.num_misses, found.num_demands
    )
    if strategy.prefetches:
        assert found.num_prefetches.sum() > 50
    else:
        whole = found.num_misses * schedule.num_rows
        np.testing.assert_array_equal(found.num_fetched_rows, whole)


@pytest.mark.parametrize("name", ["multi_look", "intelligent", "gate_look", "oracle"])
def test_prefetching_hides_misses(name, clock, run_timeline):
    lane, schedule = lane_of(TRACE), schedule_of(3)
    plain, record = (
        run_timeline(BUILT[one], lane, clock, SLOTS, topk=TOPK, schedule=schedule)
        for one in ("lru", name)
    )
    assert record.num_misses.sum() < 0.97 * plain.num_misses.sum()
    assert record.stall_s.sum() < plain.stall_s.sum()


def test_a_copy_of_one_layer_is_never_late(clock, run_timeline):
    strategy, lane, schedule = BUILT["gate_look"], lane_of(TRACE), schedule_of(1)
    found = run_timeline(strategy, lane, clock, SLOTS, topk=TOPK, schedule=schedule)
    plain = plain_schedule(strategy, lane, SLOTS[2], schedule, np.asarray(clock.copy_s))
    check(jax.tree.map(lambda leaf: leaf[2], found), plain)
    assert found.num_prefetches.sum() > 50
    assert found.num_late.sum() == 0


def test_what_is_aimed_nearer_than_a_copy_takes_is_late_or_dropped(clock, run_timeline):
    lane, slots = lane_of(TRACE), np.full((1, NUM_LAYERS), 6, np.int32)
    schedule = schedule_of(5)
    wrong = run_timeline(BUILT["wrong fifo"], lane, clock, slots, topk=TOPK, schedule=schedule)
    assert wrong.num_late.sum() > 5
    plain = plain_schedule(BUILT["wrong fifo"], lane, slots[0], schedule, np.asarray(clock.copy_s))
    check(jax.tree.map(lambda leaf: leaf[0], wrong), plain)
    # A dropped copy counts the rows it had: 20, 60, 100 or 140 of 180.
    parts = wrong.num_fetched_rows % schedule.num_rows
    assert set(np.unique(parts)) == {0, 20, 60, 100, 140}
    # No clock decides: a link a thousand times faster issues the same.
    fast = clock._replace(copy_s=clock.copy_s / 1000)
    again = run_timeline(BUILT["wrong fifo"], lane, fast, slots, topk=TOPK, schedule=schedule)
    np.testing.assert_array_equal(again.num_prefetches, wrong.num_prefetches)
    np.testing.assert_array_equal(again.num_fetched_rows, wrong.num_fetched_rows)


def test_what_is_copied_beside_layers_slows_them(clock, run_timeline):
    """Never late, every prefetch costs its share once, at the event before which it landed."""
    strategy, lane, schedule = BUILT["gate_look"], lane_of(TRACE), schedule_of(1)
    slowed = clock._replace(shadow_copy_s=2e-6 + 0 * clock.copy_s)
    free, found = (
        run_timeline(strategy, lane, one, SLOTS, topk=TOPK, schedule=schedule)
        for one in (clock, slowed)
    )
    np.testing.assert_array_equal(found.num_fetched_rows, free.num_fetched_rows)
    num_landed = found.num_fetched_rows / schedule.num_rows - found.num_misses
    assert num_landed.sum() > 0
    np.testing.assert_allclose(found.stall_s - free.stall_s, 2e-6 * num_landed, atol=1e-9)
    np.testing.assert_array_equal(found.compute_s, free.compute_s)


def test_at_most_one_prefetch_is_under_way(clock, run_timeline):
    """None is issued before the last one has landed or its event has passed."""
    lane, schedule = lane_of(TRACE), schedule_of(3)
    record = run_timeline(BUILT["gate_look"], lane, clock, SLOTS, topk=TOPK, schedule=schedule)
    issued = record.num_prefetches[2].reshape(-1, DEPTH)
    assert issued.sum(-1).max() == 1
    events, aims = np.nonzero(issued)
    assert (np.diff(events) >= np.minimum(aims[:-1] + 1, 3)).all()
    assert len(set(aims)) > 1


def test_a_warm_start_is_what_the_slots_hold_first(clock):
    lane, slots = lane_of(TRACE), np.full(NUM_LAYERS, 5, np.int32)
    start = np.zeros((NUM_LAYERS, NUM_EXPERTS), bool)
    start[np.arange(NUM_LAYERS)[:, None], np.array([[0, 3, 4, 7, 11]])] = True
    schedule, strategy = schedule_of(2), BUILT["gate_look"]
    lane = jax.tree.map(jnp.asarray, lane)
    record = jax.jit(
        lambda start: timeline(
            strategy, lane, clock, slots, KEY, topk=TOPK, schedule=schedule, start_resident=start
        )
    )(start)
    copy_s = np.asarray(clock.copy_s)
    check(record, plain_schedule(strategy, lane, slots, schedule, copy_s, start))
    first = (np.asarray(lane.demand[0]) > 0) & start
    assert record.num_hits[0, 0] == first[0].sum()
    assert first.sum() > 0
