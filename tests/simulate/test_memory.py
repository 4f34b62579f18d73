"""What a replay takes beforehand, and that capacities split over passes count the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import BackendError
from moejax.simulate import Marks, _memory, num_passes, pool, ranks, replay_bytes, stream
from moejax.simulate._blocks import BLOCK_STEPS, block_at
from moejax.simulate._pool_blocks import Limits, _serve_own, start_pools
from moejax.simulate._rank_blocks import Kind, _own_block, _own_start, _plane_block, _select_block
from moejax.simulate._select import Steps, no_tally
from moejax.strategies import CacheShape, fifo, intelligent, lru

KEY = jax.random.key(0)
NUM_EXPERTS = 12
SHAPE = CacheShape(num_layers=3, num_experts=NUM_EXPERTS, topk=4, depth=2)


@pytest.mark.parametrize("simulate", [ranks, pool])
@pytest.mark.parametrize("strategy", [lru(), fifo()], ids=["lru", "fifo"])
def test_several_passes_count_what_one_counts(simulate, strategy, random_experts, monkeypatch):
    source = stream(random_experts(41, num_steps=60), NUM_EXPERTS, with_future=False)
    capacities = np.array([1, 3, 4, 6, 9, 11, 12])
    expected = simulate(strategy, source, capacities, KEY, topk=4)
    is_pool = simulate is pool
    room = replay_bytes(strategy, SHAPE, 3, is_pool=is_pool) / _memory._SHARE_RATIO
    monkeypatch.setattr(_memory, "free_bytes", lambda num_devices=1: room)
    assert num_passes(strategy, SHAPE, len(capacities), is_pool=is_pool) == 3
    found = simulate(strategy, source, capacities, KEY, topk=4)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_never_fits_is_refused_with_its_size(random_experts, monkeypatch):
    source = stream(random_experts(41, num_steps=5), NUM_EXPERTS, with_future=False)
    room = replay_bytes(lru(), SHAPE, 1) - 2
    monkeypatch.setattr(_memory, "free_bytes", lambda num_devices=1: room / _memory._SHARE_RATIO)
    for simulate in (ranks, pool):
        with pytest.raises(BackendError, match=r"3 layers x 12 experts take .* at one capacity"):
            simulate(lru(), source, np.array([3]), KEY, topk=4)


def test_all_slots_of_a_wide_model_with_state_are_split_and_not_refused(monkeypatch):
    shape = CacheShape(num_layers=64, num_experts=512, topk=8, depth=3)
    monkeypatch.setattr(_memory, "free_bytes", lambda num_devices=1: 16 * 10**9)
    assert replay_bytes(intelligent(None), shape, 513) > 10**11
    assert 1 < num_passes(intelligent(None), shape, 513) <= 513
    assert num_passes(lru(), shape, 513) == 1


def test_there_is_memory_here():
    assert _memory.free_bytes() > 2**26


# The programs that hold most; XLA says what it sets aside for each.


def _compiled_bytes(function, *arguments):
    stats = function.lower(*arguments).compile().memory_analysis()
    parts = (
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
    )
    return sum(parts)


@pytest.mark.parametrize("name", ["fifo", "intelligent"])
def test_the_estimate_covers_what_xla_sets_aside(name):
    strategy = {"fifo": fifo(), "intelligent": intelligent(None)}[name]
    shape, num_capacities = CacheShape(4, 48, 4, 3), 24
    experts = np.zeros((BLOCK_STEPS, 4, 4), np.uint8)
    block = block_at(stream(experts, 48, with_future=False), 0, with_future=False, with_gates=False)
    marks = Marks(np.ones(BLOCK_STEPS, bool), np.zeros(BLOCK_STEPS, bool))
    kind = Kind(strategy, shape, True, False)
    slots = jnp.ones((4, num_capacities), jnp.int32)
    carry = _own_start(kind, num_capacities)
    in_ranks = _compiled_bytes(_own_block, kind, carry, no_tally(slots), block, marks, slots, KEY)
    limits = Limits(np.ones(4, np.int32), np.ones(num_capacities, np.int32))
    pools = start_pools(kind, num_capacities)
    in_pool = _compiled_bytes(_serve_own, kind, pools, block, marks, limits, KEY)
    for is_pool, size in ((False, in_ranks), (True, in_pool)):
        estimate = replay_bytes(strategy, shape, num_capacities, is_pool=is_pool)
        assert size <= estimate <= 6 * size, (is_pool, size, estimate)


def test_the_estimate_covers_planes_and_selects():
    shape, num_capacities = CacheShape(8, 128, 4, 3), 2048
    score = jax.ShapeDtypeStruct((BLOCK_STEPS, 8, 128), jnp.int32)
    size = _compiled_bytes(_plane_block, None, score)
    assert size <= replay_bytes(lru(), shape, 0) <= 6 * size
    planes = _plane_block.eval_shape(None, score)
    demand = planes[0]
    words = (jax.ShapeDtypeStruct((8, num_capacities), jnp.uint32),) * len(demand)
    seen = (jax.ShapeDtypeStruct((8,), jnp.uint32),) * len(demand)
    slots = jnp.ones((8, num_capacities), jnp.int32)
    steps = Steps(demand, planes, None, None, None)
    size = _compiled_bytes(_select_block, None, "scan", words, seen, no_tally(slots), steps, slots)
    assert size <= replay_bytes(lru(), shape, num_capacities) <= 12 * size
