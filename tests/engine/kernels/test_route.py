"""Routing inside a kernel, and whole steps of kernels against the simulator and plain JAX."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine import COUNTS, OffloadEngine
from moejax.engine._event import Sizes, Tables, read_access, serve
from moejax.engine._expert_cache import booleans, empty_cache, make_sizes
from moejax.engine.kernels import _active
from moejax.engine.kernels._copy import schedule
from moejax.engine.kernels._parts import Launch, launch
from moejax.engine.kernels._route import (
    Router,
    issue_part,
    read_routed,
    remember_step,
    route_part,
)
from moejax.offload import ExpertLayout, SlotPlan
from moejax.simulate import pool
from moejax.strategies import STRATEGIES, CacheShape

from .._offloaded import (
    FOR_KERNELS,
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_STEPS,
    TOPK,
    Run,
    check_counts,
    decode,
    predictable,
    profile,
    recorded,
    take_apart,
)
from ._lowering import count_kernels, lower_for_gpu
from ._tiny import INTERPRETED, error

HITS, LATE, MISSES, PREFETCHES, ROWS = (
    COUNTS.index(name) for name in ("hits", "late", "misses", "prefetches", "fetched_rows")
)
ALL = SlotPlan("layer", (NUM_EXPERTS,) * NUM_LAYERS)
PLANS = [SlotPlan("layer", slots) for slots in [(1, 2, 6), (6, 0, 3), (3, 6, 0), (2, 1, 6)]]
# Three requests demand up to nine experts of a layer.
WIDE = [SlotPlan("layer", slots) for slots in [(1, 6, 8), (8, 1, 6), (0, 9, 6), (12, 3, 0)]]


@functools.cache
def parts():
    return take_apart(FOR_KERNELS)


def make_engine(name: str, plan: SlotPlan, kernels: str = "interpret") -> OffloadEngine:
    model, store = parts()
    strategy = STRATEGIES[name].make(profile())
    return OffloadEngine(model, store, plan, strategy, kernels=kernels, layers_per_copy=2)


# --- whole steps ------------------------------------------------------------------------------


@functools.cache
def resident() -> Run:
    return decode(make_engine("lru", ALL), 1, NUM_STEPS)


def test_kernels_give_what_plain_jax_gives():
    plain = decode(make_engine("lru", ALL, "xla"), 1, NUM_STEPS)
    run = resident()
    np.testing.assert_array_equal(run.token_ids, plain.token_ids)
    np.testing.assert_array_equal(run.counts, plain.counts)
    assert error(jnp.asarray(run.logits), jnp.asarray(plain.logits)) < 1e-4
    assert len(np.unique(run.token_ids)) > 5, "a text that repeats itself proves little"


@pytest.mark.parametrize(
    ("name", "batch_size", "plans"), [("gate_look", 1, PLANS), ("lru", 3, WIDE)]
)
def test_slots_change_no_bit_and_counts_are_the_simulators(name, batch_size, plans):
    """The gates that are asked are the model's own."""
    token_ids, lane, _ = recorded(FOR_KERNELS, batch_size)
    engine = make_engine(name, plans[0])
    runs = [decode(engine, batch_size, NUM_STEPS, plan=plan) for plan in plans]
    wanted = resident() if batch_size == 1 else runs[0]
    for run in runs:
        np.testing.assert_array_equal(run.token_ids[:, 0], token_ids)
        np.testing.assert_array_equal(run.logits, wanted.logits)
    counts = np.stack([run.counts for run in runs])
    check_counts(engine, STRATEGIES[name].make(profile()), lane, plans, counts)
    assert counts[..., MISSES].sum() > 0
    assert engine.num_compiles == {"decode": 1}


@pytest.mark.parametrize(
    ("name", "batch_size"), [("multi_look", 1), ("intelligent", 1), ("gate_look", 3)]
)
def test_prefetches_land_or_are_late_or_dropped_as_the_simulator_says(name, batch_size):
    slots = [(4, 5, 6), (8, 1, 6), (3, 12, 0)] if batch_size == 1 else [(8, 7, 6), (12, 3, 6)]
    plans = [SlotPlan("layer", each) for each in slots]
    engine = make_engine(name, plans[0])
    experts, lane = predictable(NUM_STEPS, seed=1, batch_size=batch_size)
    table = engine.replay_table(experts, batch_size, lookahead=lane.lookahead)
    runs = [decode(engine, batch_size, NUM_STEPS, plan=plan, table=table) for plan in plans]
    for run in runs:
        np.testing.assert_array_equal(run.logits, runs[0].logits)
        np.testing.assert_array_equal(run.token_ids, runs[0].token_ids)
    counts = np.stack([run.counts for run in runs])
    check_counts(engine, STRATEGIES[name].make(profile()), lane, plans, counts)
    assert counts[..., PREFETCHES].sum() > 10
    whole = (counts[..., LATE] + counts[..., MISSES]) * engine.sizes.num_rows
    has_landed = (counts[..., ROWS] >= whole + engine.sizes.num_rows).any()
    assert has_landed == (engine.sizes.shape.depth > 1)
    if name != "multi_look":
        assert counts[..., LATE].sum() > 0
        assert (counts[..., ROWS] % engine.sizes.num_rows).any(), "none was dropped"


def test_a_pool():
    """Below what a token demands of all layers."""
    _, lane, _ = recorded(FOR_KERNELS, 1)
    plan = SlotPlan("pool", (7,))
    run = decode(make_engine("lfu", plan), 1, NUM_STEPS)
    np.testing.assert_array_equal(run.logits, resident().logits)
    strategy = STRATEGIES["lfu"].make(None)
    expected = pool(strategy, lane, np.array(plan.slots), jax.random.key(0), topk=TOPK)
    totals = run.counts.sum((0, 1))
    np.testing.assert_array_equal(totals[:, HITS], expected.num_hits[:, 0])
    np.testing.assert_array_equal(totals[:, 0], totals[:, HITS] + totals[:, MISSES])


# --- one kernel -------------------------------------------------------------------------------


class Case(NamedTuple):
    """A router and the directory that it begins with."""

    router: Router
    tables: Tables


def make_case(name, plan, batch_size, *, layers, experts, topk, is_normalized=False) -> Case:
    strategy = STRATEGIES[name].make(None)
    layout = ExpertLayout(experts, 4, 32, "float32")
    shape = CacheShape(layers, experts, topk, 1)
    sizes = make_sizes(shape, layout, plan.scope, strategy, schedule(layout.num_rows, 3))
    cache = empty_cache(sizes, layout, plan, [strategy], jnp.float32)
    flags = booleans(strategy, sizes)
    return Case(Router(strategy, sizes, flags, batch_size, is_normalized), cache.tables)


@pytest.mark.parametrize(("batch_size", "is_normalized"), [(1, False), (3, True)])
def test_what_the_experts_are_told(batch_size, is_normalized):
    """Row by row of the table, against `serve` and the softmax of the very same scores."""
    plan = SlotPlan("layer", (2, 7))
    case = make_case(
        "lru", plan, batch_size, layers=2, experts=12, topk=3, is_normalized=is_normalized
    )
    router, tables = case
    sizes = router.sizes
    columns = 1 if batch_size == 1 else 16
    rng = np.random.default_rng(batch_size)

    @jax.jit
    def route(layer, logits, tables):
        part = route_part(router, layer, logits, tables, None)
        _, (results,) = launch("route", [part], INTERPRETED)
        return read_routed(tables, results)

    @jax.jit
    def expect(layer, demand, tables):
        resident = tables.slot_of[layer] >= 0
        access = read_access(sizes, tables, None, layer, demand, resident, None)
        state = jax.tree.map(lambda leaf: leaf[layer], tables.state)
        return serve(router.strategy, sizes, tables, access, state)

    num_partners = num_past = 0
    for event in range(200):
        layer = event % 2
        # Beyond the experts there are the gate's row and padding, which must not be chosen.
        logits = rng.normal(size=(sizes.num_padded + 16, columns)).astype(np.float32)
        logits[12:] = 9.0
        score = jnp.asarray(logits[:12, :batch_size].T)
        share, chosen = jax.lax.top_k(jax.nn.softmax(score), 3)
        share = share / share.sum(-1, keepdims=True) if is_normalized else share
        demand = np.bincount(np.ravel(chosen), minlength=sizes.num_padded).astype(np.int32)
        served = jax.device_get(expect(jnp.int32(layer), jnp.asarray(demand), tables))
        before = tables
        tables, routed = route(jnp.asarray([layer], jnp.int32), jnp.asarray(logits), tables)
        # The scores are those of this step: a new step makes them differ.
        tables = tables._replace(step=tables.step + layer)
        np.testing.assert_array_equal(routed.selected_experts[:, :batch_size].T, chosen)
        np.testing.assert_allclose(routed.routing_weights[:, :batch_size].T, share, rtol=1e-5)
        table, weights = np.asarray(routed.active.table), np.asarray(routed.active.weights)
        ids = np.flatnonzero(demand)
        count, settled = len(ids), served.settled
        assert table[_active.ACTIVE].sum() == count
        assert table[_active.ACTIVE, :count].all()
        assert (table[_active.PARTNER, count:] == -1).all()
        np.testing.assert_array_equal(table[_active.EXPERT, :count], ids)
        np.testing.assert_array_equal(table[_active.SLOT, :count], settled.read_slot[ids])
        np.testing.assert_array_equal(table[_active.LANDED, :count], served.landed_rows[ids])
        np.testing.assert_array_equal(table[_active.WRITE, :count], settled.is_written[ids])
        np.testing.assert_array_equal(table[_active.SKIP, :count], settled.is_partner[ids])
        for column, expert in enumerate(ids):
            partner = table[_active.PARTNER, column]
            assert (ids[partner] if partner >= 0 else -1) == settled.partner[expert]
        dense = np.zeros((12, batch_size), np.float32)
        np.put_along_axis(dense, np.asarray(chosen).T, np.asarray(share).T, axis=0)
        np.testing.assert_allclose(weights[:count, :batch_size], dense[ids], rtol=1e-5)
        assert not weights[:, batch_size:].any()
        assert not weights[count:].any()
        np.testing.assert_array_equal(tables.slot_of[layer], settled.slot_of)
        np.testing.assert_array_equal(tables.slot_of[1 - layer], before.slot_of[1 - layer])
        np.testing.assert_array_equal(tables.counts[layer], served.counts)
        num_partners += settled.is_partner.sum()
        num_past += (settled.is_miss & ~settled.is_written).sum()
    assert num_past > 0
    assert num_partners > 0


@pytest.mark.parametrize("scope", ["layer", "pool"])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("name", ["lru", "intelligent", "gate_look"])
def test_lowers_for_a_gpu(name, batch_size, scope):
    """At the size of Qwen1.5-MoE-A2.7B; needs no GPU."""
    plan = SlotPlan(scope, (30,) * 24 if scope == "layer" else (720,))
    router, tables = make_case(name, plan, batch_size, layers=24, experts=60, topk=4)
    logits = jax.ShapeDtypeStruct((80, batch_size), jnp.float32)
    sizes: Sizes = router.sizes
    ahead = jax.ShapeDtypeStruct((sizes.shape.depth, 64, batch_size), jnp.float32)

    def run(layer, logits, tables, ahead):
        _, (results,) = launch("route", [route_part(router, layer, logits, tables, None)], Launch())
        tables, routed = read_routed(tables, results)
        issuing = issue_part(router, layer, tables, None, ahead if sizes.asks_gates else None)
        issued = [] if issuing is None else launch("issue", [issuing], Launch())[1]
        return routed, issued, remember_step(router, tables, None, Launch())

    program = lower_for_gpu(run, jax.ShapeDtypeStruct((1,), jnp.int32), logits, tables, ahead)
    prefetches = name != "lru" and scope == "layer"
    assert count_kernels(program) == 2 + prefetches
