"""One pool for all layers, in slots and in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.simulate import Marks, pool, ranks, replay
from moejax.simulate._pool import fitting_prefix
from moejax.strategies import fifo, lfu, lru, oracle
from moejax.trace import batch_trace, import_trace

KEY = jax.random.key(0)
NUM_EXPERTS = 12
STRATEGIES = {"lru": lru(), "lfu": lfu(), "fifo": fifo(), "oracle": oracle()}
MIB = 2**20


def test_the_fitting_prefix_is_what_a_sort_finds():
    rng = np.random.default_rng(1)
    lanes, num_experts = 400, 30
    # Many ties, both signs, both zeros, and what an oracle says of "never".
    values = np.array([-(2.0**30), -3.5, -1.0, -0.0, 0.0, 1e-30, 2.0, 2.5, 1e9], np.float32)
    score = rng.choice(values, (lanes, num_experts))
    candidates = rng.random((lanes, num_experts)) < rng.random((lanes, 1))
    weight = rng.integers(1, 9, (lanes, num_experts)).astype(np.int32)
    capacity = rng.integers(0, 120, lanes).astype(np.int32)
    kept = jax.jit(jax.vmap(fitting_prefix))(score, candidates, weight, capacity)
    expected = np.zeros_like(candidates)
    for lane in range(lanes):
        left = capacity[lane]
        for expert in sorted(np.flatnonzero(candidates[lane]), key=lambda e: (-score[lane, e], e)):
            left -= weight[lane, expert]
            if left < 0:
                break
            expected[lane, expert] = True
    np.testing.assert_array_equal(kept, expected)


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


def test_sorting_is_the_same_inside_and_outside_of_jit():
    score = jnp.array([0.0, -0.0, 1.0, -0.0])
    everyone, weight = jnp.ones(4, bool), jnp.ones(4, jnp.int32)
    for select in (fitting_prefix, jax.jit(fitting_prefix)):
        kept = select(score, everyone, weight, jnp.int32(3))
        assert kept.tolist() == [True, True, True, False]
