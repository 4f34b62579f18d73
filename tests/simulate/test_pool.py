"""One pool for all layers, in slots and in bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.simulate import Marks, pool, ranks, replay, stream
from moejax.simulate._blocks import BLOCK_STEPS
from moejax.simulate._replay import access_at, cache_shape, moments
from moejax.strategies import (
    Decision,
    Profile,
    Strategy,
    fifo,
    intelligent,
    lfu,
    lru,
    oracle,
    top_k,
)
from moejax.trace import batch_trace, import_trace

KEY = jax.random.key(0)
NUM_EXPERTS = 12
STRATEGIES = {"lru": lru(), "lfu": lfu(), "fifo": fifo(), "oracle": oracle()}
MIB = 2**20
PROFILE = Profile(
    num_tokens=100,
    topk=4,
    num_uses=np.random.default_rng(9).integers(0, 5, (3, NUM_EXPERTS)).astype(np.float32),
    transition=np.zeros((3, 2, NUM_EXPERTS, NUM_EXPERTS), np.float32),
    successor=np.zeros((3, NUM_EXPERTS, NUM_EXPERTS), np.float32),
)


def sorting_pool(strategy, lane, weight, capacities, marks):
    """Counts of pools that sort all candidates of all layers at every event."""
    shape = cache_shape(lane.demand, topk=4)
    experts = (shape.num_layers, shape.num_experts)
    weights = jnp.asarray(np.repeat(weight, shape.num_experts), jnp.int32)
    start = (
        strategy.init(shape),
        jnp.zeros(experts, bool),
        jnp.zeros(experts, jnp.float32),
        jnp.zeros(experts, bool),
    )

    def one_layer(moment, capacity, carry, layer):
        state, resident, score, seen = carry
        slots = jnp.full(shape.num_layers, capacity)
        access = access_at(moment, layer, shape, resident, slots)
        mine = jax.tree.map(lambda leaf: leaf[layer], state)
        mine, decision = strategy.step(mine, access, jax.random.fold_in(KEY, access.event))
        state = jax.tree.map(lambda leaf, new: leaf.at[layer].set(new), state, mine)
        demanded = access.demand > 0
        admitted = True if decision.admit is None else decision.admit
        room = capacity - (weights * resident.ravel()).sum()
        num_new = (demanded & ~seen[layer] & admitted).sum()
        num_hits = (demanded & resident[layer]).sum()
        counts = jnp.stack([num_hits, jnp.minimum(num_new, room // weights[layer * experts[1]])])
        score = score.at[layer].set(decision.keep_score.astype(jnp.float32))
        members = resident.at[layer].set((resident[layer] | demanded) & admitted).ravel()
        order = jnp.argsort(-score.ravel(), stable=True)
        sizes = jnp.where(members, weights, 0)[order]
        kept = jnp.zeros_like(members).at[order].set(members[order] & (sizes.cumsum() <= capacity))
        seen = seen.at[layer].set(seen[layer] | demanded)
        return (state, kept.reshape(experts), score, seen), counts

    def one_step(capacity, carry, step):
        moment, is_reset = step
        carry = jax.tree.map(lambda old, new: jnp.where(is_reset, new, old), carry, start)
        serve = functools.partial(one_layer, moment, capacity)
        return jax.lax.scan(serve, carry, jnp.arange(shape.num_layers))

    @jax.jit
    @jax.vmap
    def run(capacity):
        steps = (moments(lane), jnp.asarray(marks.is_reset))
        return jax.lax.scan(functools.partial(one_step, capacity), start, steps)[1]

    found = np.asarray(run(jnp.asarray(capacities, jnp.int32)))
    return found.sum(1).T, found[:, marks.is_decode].sum(1)[..., 0].T


def undecided() -> Strategy:
    """Scores that are equal in all layers but for a few, and both zeros."""

    def step(state, access, key):
        is_odd = (access.event + access.demand) % 3
        return state, Decision(jnp.where(is_odd == 0, -0.0, jnp.where(is_odd == 1, 0.0, -1.5)))

    return Strategy(lambda shape: jnp.zeros(shape.num_layers), step)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        *((name, (3, 5, 2)) for name in (*STRATEGIES, "top_k", "intelligent", "undecided")),
        ("undecided", (1, 1, 1)),
    ],
)
def test_evicting_the_worst_until_the_rest_fits_keeps_what_a_sort_keeps(
    name, weight, random_experts
):
    # More than a block of steps, resets next to its end, and pools from nothing to everything.
    num_steps = BLOCK_STEPS + 20
    lane = replay(random_experts(33, num_steps=num_steps), NUM_EXPERTS)
    steps = np.arange(num_steps)
    marks = Marks(steps % 3 > 0, np.isin(steps, [70, 71, BLOCK_STEPS - 1, BLOCK_STEPS]))
    capacities = np.array([0, 1, 4, 9, 17, 30, 71, 120])
    chosen = {"top_k": top_k(PROFILE), "intelligent": intelligent(None), "undecided": undecided()}
    strategy = (STRATEGIES | chosen)[name]
    found = pool(strategy, lane, capacities, KEY, topk=4, weight=np.array(weight), marks=marks)
    counts, decode_hits = sorting_pool(strategy, lane, weight, capacities, marks)
    np.testing.assert_array_equal(found.num_hits, counts[0])
    np.testing.assert_array_equal(found.num_forgiven, counts[1])
    np.testing.assert_array_equal(found.num_decode_hits, decode_hits)
    assert 0 < found.num_hits[:, -2].sum() < found.num_demands.sum()


@pytest.mark.parametrize("name", ["lfu", "fifo", "oracle"])
def test_a_stream_of_ids_counts_what_a_table_of_demand_counts(name, random_experts):
    # 16-bit ids of 300 experts, and two blocks.
    experts = random_experts(34, num_steps=BLOCK_STEPS + 9, num_experts=300)
    capacities = np.array([5, 60, 255, 700])
    found, expected = (
        pool(STRATEGIES[name], source, capacities, KEY, topk=4)
        for source in (stream(experts, 300), replay(experts, 300))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    best = pool(STRATEGIES["oracle"], stream(experts, 300), capacities, KEY, topk=4)
    assert (found.num_hits.sum(0) <= best.num_hits.sum(0)).all()


@pytest.mark.parametrize("num_experts", [256, 512])
def test_a_pool_of_wide_layers_equals_plain_python(num_experts, random_experts):
    experts = random_experts(35, num_steps=30, num_experts=num_experts, most=80)
    lane = replay(experts, num_experts, with_future=False)
    capacities = np.array([10, 256, 500])
    found = pool(STRATEGIES["lru"], lane, capacities, KEY, topk=4)
    for column, capacity in enumerate(capacities):
        expected = plain_lru_hits(lane.demand > 0, [1] * 3, capacity)
        np.testing.assert_array_equal(found.num_hits[:, column], expected)


def test_counts_are_exact_on_the_host(random_experts):
    lane = replay(random_experts(36, num_steps=20), NUM_EXPERTS, with_future=False)
    for part in pool(STRATEGIES["lru"], lane, np.array([9]), KEY, topk=4):
        assert isinstance(part, np.ndarray)
        assert part.dtype == np.int64


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_pool_of_one_layer_is_that_layers_slots(name, random_experts):
    experts = random_experts(31, num_layers=1, num_steps=140)
    lane, slots = replay(experts, NUM_EXPERTS), np.arange(NUM_EXPERTS + 1)
    steps = np.arange(140)
    marks = Marks(steps % 2 > 0, np.isin(steps, [30, 100]))
    shared = pool(STRATEGIES[name], lane, slots, KEY, topk=4, marks=marks)
    alone = ranks(STRATEGIES[name], lane, slots, KEY, topk=4, marks=marks)
    jax.tree.map(np.testing.assert_array_equal, shared, alone)


def plain_lru_hits(demand, weight, capacity):
    """Hits a layer of a pool in bytes: newest events first, lower experts first, until full."""
    num_steps, num_layers, _ = demand.shape
    hits, resident, last = np.zeros(num_layers, int), set(), {}
    for event in range(num_steps * num_layers):
        step, layer = divmod(event, num_layers)
        demanded = {(layer, expert) for expert in np.flatnonzero(demand[step, layer])}
        hits[layer] += len(demanded & resident)
        last |= dict.fromkeys(demanded, event)
        order = sorted(resident | demanded, key=lambda key: (-last[key], key))
        used = np.cumsum([weight[layer] for layer, _ in order])
        resident = {
            key for key, bytes_so_far in zip(order, used, strict=True) if bytes_so_far <= capacity
        }
    return hits


def test_a_pool_in_bytes_equals_plain_python(random_experts):
    experts = random_experts(32, num_steps=100)
    lane = replay(experts, NUM_EXPERTS)
    weight = np.array([300, 500, 700])
    capacities = np.array([0, 299, 2_000, 5_150, 9_900, 18_000])
    found = pool(STRATEGIES["lru"], lane, capacities, KEY, topk=4, weight=weight)
    for column, capacity in enumerate(capacities):
        expected = plain_lru_hits(lane.demand > 0, weight, capacity)
        np.testing.assert_array_equal(found.num_hits[:, column], expected)
    assert found.num_hits[:, 0].sum() == 0
    # Everything fits: only first touches miss, and they are forgiven.
    assert found.hit_ratio_warm[-1] == 1.0


def test_sizes_without_a_common_divisor_do_not_overflow(random_experts):
    experts = random_experts(32, num_steps=100)
    lane = replay(experts, NUM_EXPERTS, with_future=False)
    weight, capacities = np.array([3, 5, 7]), np.array([20, 51, 98, 181])
    small = pool(STRATEGIES["lru"], lane, capacities, KEY, topk=4, weight=weight)
    odd = weight * 10**9 + np.array([1, 0, 2])
    large = pool(STRATEGIES["lru"], lane, (capacities + 0.5) * 1e9, KEY, topk=4, weight=odd)
    np.testing.assert_array_equal(large.num_hits, small.num_hits)


def test_an_lru_pool_below_one_cycle_never_hits():
    num_layers, distinct = 5, 3
    step = np.arange(distinct)[None, :] + 2 * np.arange(num_layers)[:, None]
    experts = np.broadcast_to(step, (40, num_layers, distinct)).astype(np.uint8)
    lane = replay(experts, NUM_EXPERTS, with_future=False)
    cliff = (num_layers - 1) * distinct + 1
    found = pool(STRATEGIES["lru"], lane, np.array([cliff - 1, cliff, cliff + 2]), KEY, topk=3)
    assert found.num_hits[:, 0].sum() == 0
    # One slot more, and every event but the first of each layer finds one expert.
    np.testing.assert_array_equal(found.num_hits[:, 1], [39] * num_layers)
    np.testing.assert_array_equal(found.num_hits[:, 2], [3 * 39] * num_layers)


@pytest.mark.parametrize(
    ("name", "capacity_mib", "ratio"),
    [
        ("qwen3-30b-a3b_bigmoe-edge_top6.npz", 4000, 0.802),
        ("gemma-4-26b-a4b_bigmoe-edge_top6.npz", 4000, 0.824),
        ("gpt-oss-120b_bigmoe-edge_top2.npz", 3000, 0.459),
    ],
)
def test_recorded_device_caches_are_reproduced(name, capacity_mib, ratio, recorded_trace):
    trace = import_trace(recorded_trace(name))
    experts = batch_trace(trace, 1)
    counts = pool(
        STRATEGIES["lru"],
        replay(experts, trace.num_experts, with_future=False),
        np.array([capacity_mib * MIB]),
        KEY,
        topk=trace.topk,
        weight=trace.expert_bytes,
        marks=Marks(np.asarray(trace.phase) == 1, np.zeros(len(experts), bool)),
    )
    found = counts.num_decode_hits.sum() / counts.num_decode_demands.sum()
    assert found == pytest.approx(ratio, abs=0.003)
