"""Rung 1 against brute force, plain Python, linear programming and another simulator."""

import importlib.util
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array

from moejax.simulate import Marks, hit_curve, lru_hit_curve, ranks, replay, stream
from moejax.simulate._blocks import BLOCK_STEPS
from moejax.simulate._select import Steps, no_tally, select_block
from moejax.simulate._words import as_int32, keep_words, num_members, pack, rank_planes
from moejax.strategies import (
    Decision,
    Profile,
    Strategy,
    always_admit,
    arc,
    fifo,
    keep_best,
    lfu,
    lru,
    on_demand,
    oracle,
    s3fifo,
    sieve,
    top_k,
)
from moejax.trace import demand_counts

ROOT = Path(__file__).resolve().parents[2]
KEY = jax.random.key(0)
NUM_LAYERS, NUM_EXPERTS = 3, 12
POPULARITY = np.random.default_rng(9).integers(0, 5, (NUM_LAYERS, NUM_EXPERTS))
PROFILE = Profile(
    num_tokens=100,
    topk=4,
    num_uses=POPULARITY.astype(np.float32),
    transition=np.zeros((NUM_LAYERS, 2, NUM_EXPERTS, NUM_EXPERTS), np.float32),
    successor=np.zeros((NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS), np.float32),
)
STRATEGIES = {
    "lru": lru(),
    "lfu": lfu(),
    "fifo": fifo(),
    "oracle": oracle(),
    "top_k": top_k(PROFILE),
    "on_demand": on_demand(),
}
ALL_SLOTS = np.arange(NUM_EXPERTS + 1)


# --- the select -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [60, 64, 128])
def test_radix_select_keeps_what_a_sort_keeps(num_experts):
    rng = np.random.default_rng(num_experts)
    lanes = 300
    # Few distinct scores, so that most choices are ties; sets of 1 to 24 beside residents and
    # prefetched experts; capacities from nothing to everything, often below the demand.
    score = rng.integers(-2, rng.integers(1, 9, (lanes, 1)), (lanes, num_experts))
    sets = [
        rng.permuted(np.arange(num_experts) < size) | (rng.random(num_experts) < spread)
        for size, spread in zip(rng.integers(1, 25, lanes), rng.random(lanes) ** 2, strict=True)
    ]
    candidates = np.stack(sets)
    capacity = np.where(
        rng.random(lanes) < 0.5,
        rng.integers(0, 25, lanes),
        rng.integers(0, num_experts + 1, lanes),
    )
    words = jax.jit(keep_words)(pack(candidates), rank_planes(jnp.asarray(score)), capacity)
    expected = np.zeros_like(candidates)
    for lane in range(lanes):
        order = sorted(np.flatnonzero(candidates[lane]), key=lambda e: (-score[lane, e], e))
        expected[lane, order[: capacity[lane]]] = True
    np.testing.assert_array_equal(words, pack(expected))
    np.testing.assert_array_equal(num_members(words), expected.sum(-1))
    np.testing.assert_array_equal(keep_best(score, candidates, capacity), expected)


def test_packing_puts_expert_e_at_bit_e():
    members = np.zeros((1, 60), bool)
    members[0, [0, 31, 32, 59]] = True
    assert [word.tolist() for word in pack(members)] == [[1 | 1 << 31], [1 | 1 << 27]]


def test_scores_of_any_kind_keep_their_order_and_their_ties():
    score = jnp.array([-jnp.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 3.0, 3.0, jnp.inf], jnp.float32)
    np.testing.assert_array_equal(np.sign(np.diff(as_int32(score))), [1, 1, 1, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(as_int32(jnp.array([-3, 7], jnp.int8)), [-3, 7])


# --- plain Python -----------------------------------------------------------------------------


def plain_counts(name, demand, slots, marks):
    """Hits, forgiven first touches and decode hits of every layer, with sets and dictionaries."""
    num_steps, num_layers, num_experts = demand.shape
    counts = np.zeros((3, num_layers), int)
    for layer in range(num_layers):
        popularity = dict(enumerate(POPULARITY[layer].tolist()))
        pins = sorted(popularity, key=lambda e: (-popularity[e], e))[: num_experts // 2]
        # Written down backwards: the step of the next use of every expert.
        coming = np.full((num_steps, num_experts), num_steps)
        for step in range(num_steps - 1, 0, -1):
            coming[step - 1] = np.where(demand[step, layer], step, coming[step])
        used, last, arrived, resident, seen = {}, {}, {}, set(), set()
        for step in range(num_steps):
            if marks.is_reset[step]:
                used, last, arrived, resident, seen = {}, {}, {}, set(), set()
            demanded = set(np.flatnonzero(demand[step, layer]).tolist())
            hits = len(demanded & resident)
            for expert in demanded:
                used[expert] = used.get(expert, 0) + 1
                last[expert] = step
                if expert not in resident:
                    arrived[expert] = step
            admitted = {"on_demand": set(), "top_k": set(pins)}.get(name, set(range(num_experts)))

            # First touches fill free slots one by one, and each that finds one is forgiven.
            forgiven = min(len((demanded - seen) & admitted), slots[layer] - len(resident))
            seen |= demanded
            worth = {
                "lru": last,
                "lfu": used,
                "fifo": arrived,
                "oracle": -coming[step],
                "top_k": popularity,
                "on_demand": {},
            }[name]
            best = sorted((resident | demanded) & admitted)
            best.sort(key=worth.__getitem__, reverse=True)
            resident = set(best[: slots[layer]])
            counts[:, layer] += [hits, forgiven, hits * marks.is_decode[step]]
    return counts


@pytest.mark.parametrize("with_marks", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_equal_plain_python(name, with_marks, random_experts):
    experts = random_experts(3, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS)
    demand = demand_counts(experts, NUM_EXPERTS) > 0
    steps = np.arange(len(experts))
    marks = Marks(steps > 0, steps < 0)
    if with_marks:
        marks = Marks(steps % 3 > 0, np.isin(steps, [0, 17, 18, 90, 140]))
    # Every layer has its own slots: 0 to all in the first, all to 0 in the second.
    slots = np.stack([ALL_SLOTS, ALL_SLOTS[::-1], ALL_SLOTS * 5 % (NUM_EXPERTS + 1)])
    lane = replay(experts, NUM_EXPERTS)
    counts = ranks(STRATEGIES[name], lane, slots, KEY, topk=4, marks=marks)
    for column in range(0, len(ALL_SLOTS), 2):
        expected = plain_counts(name, demand, slots[:, column], marks)
        found = np.stack([part[:, column] for part in counts[:3]])
        np.testing.assert_array_equal(found, expected, err_msg=f"slots {slots[:, column]}")
    np.testing.assert_array_equal(counts.num_demands, demand.sum((0, 2)))
    np.testing.assert_array_equal(counts.num_decode_demands, demand[marks.is_decode].sum((0, 2)))


@pytest.mark.parametrize(
    ("name", "num_experts"),
    [("oracle", 256), ("lfu", 257), ("fifo", 300), ("lru", 512), ("oracle", 512)],
)
def test_wide_layers_equal_plain_python(name, num_experts, random_experts):
    # More experts than 8 bits name, and more resident ones.
    experts = random_experts(17, num_steps=30, num_layers=2, num_experts=num_experts, most=80)
    demand = demand_counts(experts, num_experts) > 0
    marks = Marks(np.ones(30, bool), np.zeros(30, bool))
    slots = np.array([1, 60, 256, num_experts])
    counts = ranks(STRATEGIES[name], stream(experts, num_experts), slots, KEY, topk=4)
    for column, capacity in enumerate(slots):
        expected = plain_counts(name, demand, [capacity] * 2, marks)
        found = np.stack([part[:, column] for part in counts[:3]])
        np.testing.assert_array_equal(found, expected, err_msg=f"{capacity} slots")


@pytest.mark.parametrize("num_experts", [256, 257, 512])
def test_stack_distances_of_wide_layers_equal_plain_python(num_experts, random_experts):
    # Sets that are not full, so that the largest 16-bit number stands for no expert.
    experts = random_experts(17, num_steps=30, num_layers=2, num_experts=num_experts, most=80)
    demand = demand_counts(experts, num_experts) > 0
    marks = Marks(np.ones(30, bool), np.zeros(30, bool))
    curve = lru_hit_curve(experts, num_experts)
    np.testing.assert_array_equal(curve.num_demands, demand.sum((0, 2)))
    for capacity in (1, 60, 256, num_experts):
        num_hits, num_forgiven, _ = plain_counts("lru", demand, [capacity] * 2, marks)
        np.testing.assert_array_equal(curve.num_hits[:, capacity], num_hits)
        np.testing.assert_array_equal(curve.num_forgiven[:, capacity], num_forgiven)


def test_all_numbers_of_8_bits_may_name_experts(random_experts):
    wide = random_experts(18, num_steps=40, num_layers=2, num_experts=256, least=9, most=9)
    narrow = wide.astype(np.uint8)
    for prepare in (replay, stream):
        found, expected = (
            ranks(oracle(), prepare(ids, 256), np.array([20, 200]), KEY, topk=4)
            for ids in (narrow, wide)
        )
        np.testing.assert_array_equal(found.num_demands, 9 * 40)
        np.testing.assert_array_equal(found.num_hits, expected.num_hits)
    np.testing.assert_array_equal(
        lru_hit_curve(narrow, 256).num_hits, lru_hit_curve(wide, 256).num_hits
    )


def transition_scores():
    """Keeps what tends to follow this demand: scores that read the demand and no past."""
    pairs = np.random.default_rng(8).integers(0, 9, (NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS))

    def init(shape):
        return jnp.asarray(pairs, jnp.float32)

    def step(state, access, key):
        return state, Decision((access.demand > 0).astype(jnp.float32) @ state)

    return Strategy(init, step), pairs


def test_scores_without_a_past_equal_plain_python(random_experts):
    experts = random_experts(
        3, num_steps=BLOCK_STEPS + 9, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS
    )
    strategy, pairs = transition_scores()
    counts = ranks(strategy, stream(experts, NUM_EXPERTS), ALL_SLOTS, KEY, topk=4)
    for layer, slots in itertools.product(range(NUM_LAYERS), (1, 5, 9)):
        resident, num_hits = set(), 0
        for row in experts[:, layer].tolist():
            demanded = [expert for expert in row if expert < NUM_EXPERTS]
            num_hits += len(resident.intersection(demanded))
            worth = pairs[layer, demanded].sum(0)
            candidates = sorted(resident.union(demanded))
            resident = set(sorted(candidates, key=lambda e: -worth[e])[:slots])
        assert counts.num_hits[layer, slots] == num_hits


@pytest.mark.parametrize("name", ["lfu", "fifo", "oracle", "top_k"])
def test_a_stream_of_ids_counts_what_a_table_of_demand_counts(name, random_experts):
    # Three blocks, the last one not full, and ids named twice.
    experts = random_experts(7, num_steps=2 * BLOCK_STEPS + 40, num_experts=NUM_EXPERTS)
    experts = np.concatenate([experts, experts[..., ::-1][..., :3]], -1)
    steps = np.arange(len(experts))
    marks = Marks(steps % 5 > 1, np.isin(steps, [BLOCK_STEPS - 1, BLOCK_STEPS, len(steps) - 1]))
    found, expected = (
        ranks(STRATEGIES[name], source, ALL_SLOTS, KEY, topk=4, marks=marks)
        for source in (stream(experts, NUM_EXPERTS), replay(experts, NUM_EXPERTS))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stream_holds_no_table_of_steps_and_experts(random_experts):
    experts = random_experts(7, num_steps=BLOCK_STEPS + 1, num_experts=NUM_EXPERTS)
    source = stream(experts, NUM_EXPERTS)
    assert source.experts is experts
    assert source.coming is not None
    assert source.coming.size == 2 * NUM_LAYERS * NUM_EXPERTS


@pytest.mark.parametrize("name", ["lfu", "fifo", "oracle", "top_k"])
def test_lanes_side_by_side_count_what_each_counts_alone(name, random_experts):
    alone = [random_experts(seed, num_steps=300) for seed in (31, 32)]
    marks = Marks(np.arange(300) % 3 > 0, np.arange(300) == 290)
    keys = jax.random.split(KEY, 2)
    both = stream(np.stack(alone, axis=1), NUM_EXPERTS)
    slots = np.array([2, 7])
    found = ranks(STRATEGIES[name], both, slots, keys, topk=4, marks=marks)
    for lane, experts in enumerate(alone):
        source = stream(experts, NUM_EXPERTS)
        expected = ranks(STRATEGIES[name], source, slots, keys[lane], topk=4, marks=marks)
        for field, one in expected._asdict().items():
            np.testing.assert_array_equal(getattr(found, field)[lane], one, field)
        np.testing.assert_array_equal(found.hit_ratio_warm[lane], expected.hit_ratio_warm)


@pytest.mark.parametrize("name", ["lru", "lfu", "oracle", "top_k"])
def test_more_slots_never_miss_more_where_scores_read_no_cache(name, random_experts):
    experts = random_experts(4, num_experts=NUM_EXPERTS)
    lane = replay(experts, NUM_EXPERTS)
    counts = ranks(STRATEGIES[name], lane, ALL_SLOTS, KEY, topk=4)
    assert (np.diff(counts.num_hits, axis=1) >= 0).all()
    assert (counts.num_hits[:, 0] == 0).all()


def test_with_all_slots_only_first_touches_miss(random_experts):
    experts = random_experts(4, num_experts=NUM_EXPERTS)
    lane = replay(experts, NUM_EXPERTS)
    counts = ranks(STRATEGIES["lru"], lane, ALL_SLOTS, KEY, topk=4)
    touched = (lane.demand > 0).any(0).sum(-1)
    np.testing.assert_array_equal(counts.num_hits[:, -1], counts.num_demands - touched)
    assert counts.hit_ratio_warm[-1] == 1.0


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 5, 11])
def test_stack_distances_give_the_lru_of_every_capacity(most, random_experts):
    # 300 steps: more than one block of the closed form, and of the ranks.
    experts = random_experts(5, num_steps=300, most=most)
    closed = lru_hit_curve(experts, NUM_EXPERTS, keep_steps=20)
    replayed = hit_curve(STRATEGIES["lru"], experts, NUM_EXPERTS, KEY, topk=4)
    np.testing.assert_array_equal(closed.num_hits, replayed.num_hits)
    np.testing.assert_array_equal(closed.num_forgiven, replayed.num_forgiven)
    np.testing.assert_array_equal(closed.num_demands, replayed.num_demands)
    np.testing.assert_array_equal(closed.hit_ratio_warm, replayed.hit_ratio_warm)
    # The misses kept step by step are those that 20 steps fewer do not have.
    earlier = lru_hit_curve(experts[:-20], NUM_EXPERTS)
    late_misses = (closed.num_demands - earlier.num_demands)[:, None]
    late_misses = late_misses - (closed.num_hits - earlier.num_hits)
    np.testing.assert_array_equal(closed.step_misses.sum(0), late_misses)


def test_stack_distances_of_a_wide_batch_count_an_expert_once(random_experts):
    # More places than experts, and 256 experts, which leave no 8-bit id for none.
    narrow = random_experts(5, num_steps=140, num_experts=NUM_EXPERTS, least=5)
    wide = np.tile(narrow, 3)
    for few, many, num_experts in ((narrow, wide, NUM_EXPERTS), (narrow, wide[..., :10], 256)):
        one, other = lru_hit_curve(few, num_experts), lru_hit_curve(many, num_experts)
        np.testing.assert_array_equal(one.num_hits, other.num_hits)
        np.testing.assert_array_equal(one.num_demands, 140 * 5)


def test_stack_distances_count_more_than_255_experts_of_one_step():
    experts = np.arange(300, dtype=np.uint16)[None, None].repeat(2, axis=0)
    closed = lru_hit_curve(experts, 300)
    assert closed.num_demands.tolist() == [600]
    np.testing.assert_array_equal(closed.num_hits[0], np.arange(301))
    np.testing.assert_array_equal(closed.num_forgiven[0], np.arange(301))


def most_hits_possible(demand, slots):
    """The most hits any replacement can reach: a linear programme, not a rule.

    A hit is an interval from one use of an expert to its next, kept or not; at most `slots`
    intervals may cover the time between two events. The matrix has consecutive ones, so the
    programme has an integer optimum.
    """
    num_steps = len(demand)
    rows, columns, num_intervals = [], [], 0
    for expert in range(demand.shape[1]):
        uses = np.flatnonzero(demand[:, expert])
        for first, second in itertools.pairwise(uses.tolist()):
            rows += range(first, second)
            columns += [num_intervals] * (second - first)
            num_intervals += 1
    cover = csr_array((np.ones(len(rows)), (rows, columns)), shape=(num_steps, num_intervals))
    limit = np.full(num_steps, slots)
    found = linprog(-np.ones(num_intervals), A_ub=cover, b_ub=limit, bounds=(0, 1))
    assert found.success
    return round(-found.fun)


@pytest.mark.parametrize("most", [1, 6])
def test_oracle_reaches_the_optimum_of_every_capacity(most, random_experts):
    experts = random_experts(6, num_layers=2, most=most)
    lane = replay(experts, NUM_EXPERTS)
    counts = ranks(STRATEGIES["oracle"], lane, ALL_SLOTS, KEY, topk=4)
    for layer in range(2):
        for slots in ALL_SLOTS:
            best = most_hits_possible(lane.demand[:, layer] > 0, slots)
            assert counts.num_hits[layer, slots] == best, (layer, slots)


# --- another simulator ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts/make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(maker):
    """Experts, and the other simulator's hits at 1 slot to all."""
    stored = json.loads(maker.GOLDEN.read_text())
    experts = maker.make_experts()
    assert stored["trace"] == maker.describe(experts)
    names = ("lru", "belady", "sieve", "s3fifo", "arc")
    return experts, {name: np.array(stored[name]) for name in names}


def hits_of(strategy, experts, num_experts):
    slots = np.arange(1, num_experts + 1)
    return ranks(strategy, replay(experts, num_experts), slots, KEY, topk=1).num_hits


def test_lru_equals_libcachesim_on_every_cell(golden, maker):
    experts, hits = golden
    np.testing.assert_array_equal(hits_of(lru(), experts, maker.NUM_EXPERTS), hits["lru"])
    admitting = hits_of(always_admit(lru()), experts, maker.NUM_EXPERTS)
    np.testing.assert_array_equal(admitting, hits["lru"])
    closed = lru_hit_curve(experts, maker.NUM_EXPERTS)
    np.testing.assert_array_equal(closed.num_hits[:, 1:], hits["lru"])


@pytest.mark.parametrize("name", ["sieve", "s3fifo"])
def test_caches_of_the_web_equal_libcachesim_on_every_cell_it_can_do(name, golden, maker):
    experts, hits = golden
    first = maker.LEAST_SLOTS.get(name, 1)
    found = hits_of({"sieve": sieve(), "s3fifo": s3fifo()}[name], experts, maker.NUM_EXPERTS)
    np.testing.assert_array_equal(found[:, first - 1 :], hits[name])


def test_arc_differs_from_libcachesim_only_where_its_sum_of_fractions_is_rounded(golden, maker):
    """Ours equals exact fractions (tests/strategies); the peer adds them up in 64 bits."""
    experts, hits = golden
    gap = hits_of(arc(), experts, maker.NUM_EXPERTS) - hits["arc"]
    assert np.count_nonzero(gap) == 3
    assert np.abs(gap).max() == 1


def test_belady_that_must_admit_equals_libcachesim_on_every_cell(golden, maker):
    experts, hits = golden
    found = hits_of(always_admit(oracle()), experts, maker.NUM_EXPERTS)
    np.testing.assert_array_equal(found, hits["belady"])


def test_oracle_may_bypass_and_lies_between_libcachesim_at_this_and_one_more_slot(golden, maker):
    """A cache that must admit spends a slot on the newcomer, whatever it is worth.

    With one slot more it can always imitate one that may bypass, and with the same it cannot
    do better.
    """
    experts, hits = golden
    found = hits_of(oracle(), experts, maker.NUM_EXPERTS)
    assert (found >= hits["belady"]).all()
    assert (found[:, :-1] <= hits["belady"][:, 1:]).all()
    assert (found > hits["belady"]).any()
    best = [most_hits_possible(experts[:, 0] == np.arange(maker.NUM_EXPERTS), c) for c in (1, 6)]
    assert found[0, [0, 5]].tolist() == best


@pytest.mark.peers
def test_golden_counts_are_what_libcachesim_says_today(golden, maker):
    pytest.importorskip("libcachesim")
    experts, hits = golden
    live = maker.count_hits(experts)
    for name, counts in hits.items():
        np.testing.assert_array_equal(live[name], counts)


# --- compilation ------------------------------------------------------------------------------


def test_one_trace_serves_all_blocks_capacities_and_keys(random_experts):
    num_traced = 0
    inner = lru()

    def step(state, access, key):
        nonlocal num_traced
        num_traced += 1
        return inner.step(state, access, key)

    strategy = Strategy(inner.init, step)
    short = replay(random_experts(1, num_steps=20), NUM_EXPERTS)
    ranks(strategy, short, np.array([1, 2, 3]), KEY, topk=4)
    after_one_block = num_traced
    assert after_one_block > 0
    long = replay(random_experts(2, num_steps=300), NUM_EXPERTS)
    ranks(strategy, long, np.array([4, 0, 12]), jax.random.key(1), topk=4)
    assert num_traced == after_one_block


# --- the kernel of a GPU ----------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "num_capacities"), [(3, 1), (8, 5), (4, 256)])
@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked"])
def test_the_kernel_selects_what_the_scan_selects(num_rows, num_capacities, marked):
    rng = np.random.default_rng(num_capacities)
    num_steps, num_experts = 9, 64
    score = jnp.asarray(rng.integers(0, 9, (num_steps, num_rows, num_experts)), jnp.int32)
    demand = jnp.asarray(rng.random(score.shape) < 0.1)
    steps = Steps(
        demand=pack(demand),
        planes=rank_planes(score),
        admit=pack(jnp.asarray(rng.random(score.shape) < 0.8)) if marked else None,
        is_decode=jnp.arange(num_steps) % 3 > 0 if marked else None,
        is_reset=jnp.arange(num_steps) == 5 if marked else None,
    )
    slots = jnp.asarray(rng.integers(0, num_experts, (num_rows, num_capacities)), jnp.int32)
    nothing = (jnp.zeros(slots.shape, jnp.uint32),) * 2
    seen = (jnp.zeros(num_rows, jnp.uint32),) * 2
    before = no_tally(slots)
    scanned, compiled = (
        jax.jit(select_block, static_argnames="how")(nothing, seen, before, steps, slots, how=how)
        for how in ("scan", "interpret")
    )
    for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(scanned[2].num_hits.sum()) > 0


def test_the_kernel_lowers_for_a_gpu():
    slots = jnp.full((4, 16), 3, jnp.int32)
    words, seen = (jnp.zeros(slots.shape, jnp.uint32),) * 2, (jnp.zeros(4, jnp.uint32),) * 2
    step = (jnp.zeros((5, 4), jnp.uint32),) * 2
    steps = Steps(step, (step,) * 6, step, jnp.ones(5, bool), jnp.zeros(5, bool))
    traced = jax.jit(select_block, static_argnames="how").trace(
        words, seen, no_tally(slots), steps, slots, how="kernel"
    )
    assert "select_block" in traced.lower(lowering_platforms=("cuda",)).as_text()
