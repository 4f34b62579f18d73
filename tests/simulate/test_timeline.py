"""Rung 2 against its invariants and rung 1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.simulate import Record, by_target, ranks, replay, timeline
from moejax.simulate._prefetch import MAX_PREFETCHES
from moejax.strategies import STRATEGIES, host_compute, learn_profile, reuse
from moejax.strategies._reuse import LRU_WEIGHTS
from moejax.trace import Trace, batch_trace

KEY = jax.random.key(0)
NUM_STEPS, NUM_LAYERS, NUM_EXPERTS, TOPK = 60, 4, 12, 3
LOOKAHEAD_NOISE = 0.2
# Unequal slots: none, fewer than an event demands, about half, all.
SLOTS = np.array([[0, 2, 6, 12], [2, 2, 2, 2], [4, 7, 3, 5], [12, 6, 2, 9]], np.int32)


class Case(NamedTuple):
    """Random batched routing of one strategy at several capacities, on the timeline."""

    strategy: object
    lane: object
    clock: object
    record: Record


def random_trace(seed, num_tokens=NUM_STEPS) -> Trace:
    """Sets of `TOPK`, with lookahead that is right four times in five."""
    rng = np.random.default_rng(seed)
    shape = (num_tokens, NUM_LAYERS, NUM_EXPERTS)
    noise = rng.gumbel(size=shape)
    noise[1:] += 0.7 * noise[:-1]
    for layer in range(1, NUM_LAYERS):
        noise[:, layer] += 1.5 * np.roll(noise[:, layer - 1], layer, axis=-1)
    experts = np.argsort(-noise, axis=-1)[..., :TOPK].astype(np.uint8)
    flat = experts.reshape(-1, TOPK)
    ahead = np.stack([np.roll(flat, -d - 1, axis=0) for d in range(3)], axis=1)
    wrong = rng.random(ahead.shape) < LOOKAHEAD_NOISE
    said = np.where(wrong, rng.integers(0, NUM_EXPERTS, ahead.shape), ahead)
    return Trace(
        experts=experts,
        num_experts=NUM_EXPERTS,
        request_start=np.array([0, num_tokens // 2, num_tokens], np.int64),
        lookahead=said.reshape(num_tokens, NUM_LAYERS, 3, TOPK).astype(np.uint8),
    )


PROFILE = learn_profile(random_trace(1, 200))
BUILT = {name: kind.make(PROFILE) for name, kind in STRATEGIES.items()}
TRACE = random_trace(2)


def lane_of(trace, batch_size=1):
    """The lane of a trace; with more places, all of them follow the same lookahead."""
    experts = batch_trace(trace, batch_size)
    said = np.asarray(trace.lookahead)[: len(experts)][:, :, :, None]
    return replay(experts, trace.num_experts, lookahead=said)


def latency_s(record):
    return (record.compute_s + record.stall_s).sum((-1, -2))


def num_fetched(record):
    prefetches = record.num_prefetches.sum((-1, -2, -3))
    return (record.num_misses - record.num_on_host).sum((-1, -2)) + prefetches


@pytest.fixture(scope="module")
def cases(run_timeline):
    """Every strategy, run once on a batch of two with a link that is sometimes in the way."""
    found = {}

    def case(name, clock) -> Case:
        if name not in found:
            lane = lane_of(TRACE, 2)
            found[name] = Case(
                BUILT[name], lane, clock, run_timeline(BUILT[name], lane, clock, SLOTS, topk=TOPK)
            )
        return found[name]

    return case


# --- invariants of every strategy -------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_demand_is_a_hit_late_or_a_miss_and_slots_are_never_exceeded(
    name, cases, round_clock
):
    case = cases(name, round_clock(NUM_LAYERS))
    record = case.record
    np.testing.assert_array_equal(
        record.num_hits + record.num_late + record.num_misses, record.num_demands
    )
    demand = (case.lane.demand > 0).sum(-1)
    np.testing.assert_array_equal(record.num_demands, np.broadcast_to(demand, (4, *demand.shape)))
    assert (record.num_resident <= SLOTS[:, None]).all()
    assert (record.num_hits <= SLOTS[:, None]).all()
    assert (record.num_late <= 1).all()
    assert (record.stall_s >= 0).all()
    assert (record.num_on_host == 0).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_useful_prefetch_was_issued(name, cases, round_clock):
    record = cases(name, round_clock(NUM_LAYERS)).record
    aimed = np.stack([by_target(lane) for lane in record.num_prefetches]).sum(1)
    useful = record.num_useful.sum(1)
    assert (useful <= aimed).all()
    assert (record.num_prefetches.sum(-1) <= MAX_PREFETCHES).all()
    assert (record.num_late.sum(1) <= useful).all()
    if BUILT[name].prefetches:
        assert aimed.sum() > 0
    else:
        assert aimed.sum() == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_fetches_less_than_the_oracle(name, cases, round_clock):
    clock = round_clock(NUM_LAYERS)
    oracle = cases("oracle", clock).record
    assert (num_fetched(cases(name, clock).record) >= num_fetched(oracle)).all()


def test_the_oracle_prefetches_and_still_fetches_what_demand_alone_would(cases, round_clock):
    case = cases("oracle", round_clock(NUM_LAYERS))
    counts = ranks(BUILT["oracle"], case.lane, SLOTS.T, KEY, topk=TOPK)
    by_demand = (counts.num_demands[:, None] - counts.num_hits).sum(0)
    np.testing.assert_array_equal(num_fetched(case.record), by_demand)
    assert case.record.num_prefetches.sum() > 50
    aimed = case.record.num_prefetches.sum((1, 2, 3))
    np.testing.assert_array_equal(case.record.num_useful.sum((1, 2)), aimed)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "oracle"])
def test_only_the_oracle_reads_the_future(name, cases, round_clock, run_timeline):
    case = cases(name, round_clock(NUM_LAYERS))
    noise = np.random.default_rng(5).integers(0, 1000, case.lane.next_use.shape, np.int32)
    lane = case.lane._replace(next_use=noise)
    jax.tree.map(
        np.testing.assert_array_equal,
        case.record,
        run_timeline(case.strategy, lane, case.clock, SLOTS, topk=TOPK),
    )


# --- special links ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["intelligent", "oracle"])
def test_an_infinite_link_never_stalls(name, round_clock, run_timeline):
    clock = round_clock(NUM_LAYERS, copy_s=np.zeros(NUM_LAYERS))
    record = run_timeline(BUILT[name], lane_of(TRACE, 2), clock, SLOTS, topk=TOPK)
    assert (record.stall_s == 0).all()
    assert (record.num_late == 0).all()


@pytest.mark.parametrize("name", ["lru", "lfu", "fifo", "top_k", "on_demand", "oracle"])
def test_without_prefetch_counts_are_those_of_ranks_and_time_adds_up(
    name, round_clock, run_timeline
):
    strategy = BUILT[name]
    inner = strategy.step

    def demand_only(state, access, key):
        state, decision = inner(state, access, key)
        return state, decision._replace(prefetch_probability=None)

    strategy = strategy._replace(step=demand_only, reach=0)
    copy_s = np.array([5e-6, 3e-6, 8e-6, 1e-6])
    clock = round_clock(NUM_LAYERS, overlap_ratio=0.0, copy_s=copy_s)
    lane = lane_of(TRACE, 2)
    record = run_timeline(strategy, lane, clock, SLOTS, topk=TOPK)
    counts = ranks(strategy, lane, SLOTS.T, KEY, topk=TOPK)
    np.testing.assert_array_equal(record.num_hits.sum(1).T, counts.num_hits)
    assert record.num_late.sum() == record.num_prefetches.sum() == 0
    copies_s = (record.num_misses * copy_s).sum((1, 2))
    np.testing.assert_allclose(
        latency_s(record), record.compute_s.sum((1, 2)) + copies_s, rtol=1e-5
    )


def test_demand_only_strategies_never_hit_more_than_the_oracle(random_experts):
    slots = np.array([[1, 3, 5, 8, 12], [2, 4, 1, 9, 6], [7, 1, 2, 3, 11]])
    patterns = [
        random_experts(11),
        random_experts(12, least=4, most=7),
        np.sort(random_experts(13, least=2, most=4), axis=-1)[::-1],
        # A loop, which recency never hits below its length.
        (np.arange(150)[:, None, None] * 2 + np.arange(2)[None, None] + np.arange(3)[:, None])
        .astype(np.uint8)
        .__mod__(np.uint8(10)),
    ]
    for experts in patterns:
        lane = replay(experts, 12)
        best = ranks(BUILT["oracle"], lane, slots, KEY, topk=TOPK).num_hits
        for name in ("lru", "lfu", "fifo", "on_demand"):
            hits = ranks(BUILT[name], lane, slots, KEY, topk=TOPK).num_hits
            assert (hits <= best).all(), name


# --- transformations --------------------------------------------------------------------------


def test_vmap_over_lanes_is_a_loop_and_jit_is_eager(round_clock, run_timeline):
    strategy, lane, clock = BUILT["gate_look"], lane_of(TRACE, 2), round_clock(NUM_LAYERS)
    together = run_timeline(strategy, lane, clock, SLOTS, topk=TOPK)
    for i in range(len(SLOTS)):
        alone = run_timeline(strategy, lane, clock, SLOTS[i : i + 1], topk=TOPK)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[0]), together, alone)
    strategy = BUILT["lru"]
    compiled = run_timeline(strategy, lane, clock, SLOTS, topk=TOPK)
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), lane)
    with jax.disable_jit():
        eager = timeline(strategy, first, clock, SLOTS[2], KEY, topk=TOPK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2, :1], b, 1e-6), compiled, eager)


def test_hyper_parameters_are_lanes_too(round_clock):
    lane, clock = lane_of(TRACE, 1), round_clock(NUM_LAYERS)
    lane = jax.tree.map(jnp.asarray, lane._replace(next_use=None, lookahead=None))

    def total_hits(weights):
        made = reuse(None, weights)
        return timeline(made, lane, clock, SLOTS[2], KEY, topk=TOPK).num_hits.sum()

    habit = jnp.zeros(len(LRU_WEIGHTS)).at[2].set(1.0)
    weights = jnp.stack([jnp.array(LRU_WEIGHTS), habit, -habit])
    hits = jax.jit(jax.vmap(total_hits))(weights)
    plain = timeline(BUILT["lru"], lane, clock, SLOTS[2], KEY, topk=TOPK).num_hits.sum()
    assert hits[0] == plain
    # Keeping what is rare is worse than keeping what is frequent.
    assert hits[2] < hits[1]


# --- prefetching and computing on the host ----------------------------------------------------


@pytest.mark.parametrize("host_s", [1e-8, 15.5e-6, 1.0])
def test_the_host_takes_misses_only_where_the_wait_gets_shorter(host_s, round_clock, run_timeline):
    clock = round_clock(NUM_LAYERS, host_expert_s=np.full(NUM_LAYERS, host_s), overlap_ratio=0.0)
    lane = lane_of(TRACE, 2)
    plain = run_timeline(BUILT["on_demand"], lane, clock, SLOTS, topk=TOPK)
    record = run_timeline(host_compute(BUILT["on_demand"]), lane, clock, SLOTS, topk=TOPK)
    # Nothing is kept, so both see the same misses at every event.
    np.testing.assert_array_equal(record.num_misses, plain.num_misses)
    assert (record.num_on_host <= record.num_misses).all()
    assert (record.stall_s <= plain.stall_s).all()
    assert (num_fetched(record) <= num_fetched(plain)).all()
    if host_s == 1e-8:
        np.testing.assert_array_equal(record.num_on_host, record.num_misses)
        assert (latency_s(record) < latency_s(plain)).all()
    if host_s == 1.0:
        assert record.num_on_host.sum() == 0
