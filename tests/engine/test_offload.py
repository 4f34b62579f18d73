"""Offloaded decoding in plain JAX: the resident tokens, bit by bit, and the simulator's counts."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from moejax.engine import COUNTS, Engine, OffloadEngine, Sampling
from moejax.errors import UsageError
from moejax.offload import ExpertStore, SlotPlan
from moejax.simulate import pool, replay
from moejax.strategies import STRATEGIES

from ._offloaded import (
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_STEPS,
    TOPK,
    WITH_A_GAP,
    Run,
    check_counts,
    decode,
    predictable,
    profile,
    recorded,
    start,
    take_apart,
)
from ._tiny import random_model

HITS, LATE, MISSES, PREFETCHES, ROWS = (
    COUNTS.index(name) for name in ("hits", "late", "misses", "prefetches", "fetched_rows")
)
ALL = SlotPlan("layer", (NUM_EXPERTS,) * NUM_LAYERS)
# A token demands three experts of a layer, three requests up to nine. Plans of one list have as
# many slots together, so that they share a program.
PLANS = {
    ("layer", 1): [SlotPlan("layer", s) for s in [(1, 2, 6), (6, 0, 3), (3, 6, 0), (2, 1, 6)]],
    ("layer", 3): [SlotPlan("layer", s) for s in [(1, 6, 8), (8, 1, 6), (0, 9, 6), (12, 3, 0)]],
    # Below what a token demands of all layers, and just that.
    ("pool", 1): [SlotPlan("pool", (7,))],
    ("pool", 3): [SlotPlan("pool", (22,))],
}
# With those that are replayed below, every strategy.
CASES = [
    ("lru", "layer", 1),
    ("on_demand", "layer", 3),
    ("top_k", "layer", 1),
    ("fifo", "pool", 1),
    ("lfu", "pool", 3),
    ("gate_look", "layer", 1),
]


@functools.cache
def parts():
    return take_apart(WITH_A_GAP)


def make_engine(name: str, plan: SlotPlan) -> OffloadEngine:
    model, store = parts()
    strategy = STRATEGIES[name].make(profile())
    return OffloadEngine(model, store, plan, strategy, kernels="xla", layers_per_copy=2)


@functools.cache
def decoded(name: str, scope: str, batch_size: int) -> tuple[OffloadEngine, list[Run]]:
    plans = PLANS[scope, batch_size]
    engine = make_engine(name, plans[0])
    return engine, [decode(engine, batch_size, NUM_STEPS, plan=plan) for plan in plans]


@functools.cache
def resident(batch_size: int) -> Run:
    """All experts in slots: after the first demand of each nothing is fetched."""
    run = decode(make_engine("lru", ALL), batch_size, NUM_STEPS)
    assert run.counts[NUM_STEPS // 2 :, :, :, MISSES].sum() <= run.counts[..., MISSES].sum() // 4
    return run


@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_in_slots_is_the_engine_without_offloading(batch_size):
    tokens, lane, _ = recorded(WITH_A_GAP, batch_size)
    run = resident(batch_size)
    np.testing.assert_array_equal(run.token_ids[:, 0], tokens)
    assert len(np.unique(tokens)) > 5, "a text that repeats itself proves little"
    np.testing.assert_array_equal(run.counts[:, 0, :, 0], (lane.demand > 0).sum(-1))


@pytest.mark.parametrize(("name", "scope", "batch_size"), CASES)
def test_bits_are_the_resident_ones_and_counts_the_simulators(name, scope, batch_size):
    plans = PLANS[scope, batch_size]
    _, lane, _ = recorded(WITH_A_GAP, batch_size)
    engine, runs = decoded(name, scope, batch_size)
    for run in runs:
        np.testing.assert_array_equal(run.token_ids, resident(batch_size).token_ids)
        np.testing.assert_array_equal(run.logits, resident(batch_size).logits)
    assert engine.num_compiles == {"decode": 1}
    counts = np.stack([run.counts for run in runs])
    assert counts[..., MISSES].sum() > 0
    strategy = STRATEGIES[name].make(profile())
    if scope == "layer":
        check_counts(engine, strategy, lane, plans, counts)
        return
    expected = pool(strategy, lane, np.array(plans[0].slots), jax.random.key(0), topk=TOPK)
    totals = counts[0].sum((0, 1))
    np.testing.assert_array_equal(totals[:, HITS], expected.num_hits[:, 0])
    np.testing.assert_array_equal(totals[:, 0], totals[:, HITS] + totals[:, MISSES])
    np.testing.assert_array_equal(totals[:, ROWS], totals[:, MISSES] * engine.sizes.num_rows)


@functools.cache
def replayed() -> Run:
    experts, _ = predictable(NUM_STEPS, seed=1)
    engine = make_engine("lru", ALL)
    return decode(engine, 1, NUM_STEPS, table=engine.replay_table(experts, 1))


@pytest.mark.parametrize("name", ["multi_look", "intelligent", "gate_look", "oracle"])
def test_prefetching_changes_no_bit_and_is_what_the_simulator_says(name):
    plans = [SlotPlan("layer", slots) for slots in [(4, 5, 6), (8, 1, 6), (3, 12, 0)]]
    engine = make_engine(name, plans[0])
    experts, lane = predictable(NUM_STEPS, seed=1)
    table = engine.replay_table(experts, 1, lookahead=lane.lookahead)
    runs = [decode(engine, 1, NUM_STEPS, plan=plan, table=table) for plan in plans]
    for run in runs:
        np.testing.assert_array_equal(run.token_ids, replayed().token_ids)
        np.testing.assert_array_equal(run.logits, replayed().logits)
    assert engine.num_compiles == {"decode": 1}
    counts = np.stack([run.counts for run in runs])
    check_counts(engine, STRATEGIES[name].make(profile()), lane, plans, counts)
    assert counts[..., PREFETCHES].sum() > 10
    # What is aimed two layers ahead lands in time, what is aimed one ahead is late or in vain.
    whole = (counts[..., LATE] + counts[..., MISSES]) * engine.sizes.num_rows
    has_landed = (counts[..., ROWS] >= whole + engine.sizes.num_rows).any()
    assert has_landed == (engine.sizes.shape.depth > 1)
    if name in ("intelligent", "gate_look"):
        assert counts[..., LATE].sum() > 0
        assert (counts[..., ROWS] % engine.sizes.num_rows).any()


def test_an_oracle_rules_a_pool():
    plan = SlotPlan("pool", (14,))
    engine = make_engine("oracle", plan)
    experts, lane = predictable(NUM_STEPS, seed=1)
    run = decode(engine, 1, 2 * NUM_STEPS, table=engine.replay_table(experts, 1))
    np.testing.assert_array_equal(run.logits[:NUM_STEPS], replayed().logits)
    strategy = STRATEGIES["oracle"].make(None)
    expected = pool(strategy, lane, np.array(plan.slots), jax.random.key(0), topk=TOPK)
    once, again = run.counts[:NUM_STEPS], run.counts[NUM_STEPS:]
    np.testing.assert_array_equal(once.sum((0, 1))[:, HITS], expected.num_hits[:, 0])
    # It knows the future of a replay that begins again, and finds slots that are not empty.
    assert again[..., MISSES].sum() <= once[..., MISSES].sum()


def test_a_replay_begins_again_and_a_place_may_demand_less():
    """Of the second request only two experts are known in every other step."""
    experts, _ = predictable(8, seed=3, batch_size=3)
    experts[::2, :, -1] = 255
    plan = SlotPlan("layer", (4, 9, 2))
    engine = make_engine("lru", plan)
    run = decode(engine, 3, 20, table=engine.replay_table(experts, 3))
    again = replay(np.tile(experts, (3, 1, 1))[:20], NUM_EXPERTS)
    check_counts(engine, STRATEGIES["lru"].make(None), again, [plan], run.counts[None])


def test_many_steps_in_one_call_are_as_many_calls():
    engine, (*_, run) = decoded("lru", "layer", 1)
    engine = engine.with_plan(PLANS["layer", 1][-1])
    before = dict(engine.num_compiles)
    program = engine.program(1, 64, num_steps=4, is_recording=True)
    state = start(engine, 1)
    _, _, experts = recorded(WITH_A_GAP, 1)
    for first in (0, 4, 8):
        state, output = program(state)
        np.testing.assert_array_equal(output.token_ids, run.token_ids[first : first + 4, 0])
        np.testing.assert_array_equal(output.counts, run.counts[first : first + 4, 0])
        np.testing.assert_array_equal(output.logits, run.logits[first + 3])
        assert output.routed is not None
        np.testing.assert_array_equal(output.routed.experts[0, 0], experts[first + 3, :, 0])
    assert engine.num_compiles == {"decode": before["decode"] + 1}


def test_draws_are_the_resident_ones():
    """Also prompts of several tokens, whose experts stream past before the first step."""
    how = {"max_new_tokens": 9, "sampling": Sampling(0.9, 0.95), "seed": 5, "record": True}
    prompts = [[7, 8, 9], [1], [5, 5, 5, 6]]
    config = replace(WITH_A_GAP, num_hidden_layers=2)
    plan, strategy = SlotPlan("layer", (5,)), STRATEGIES["lfu"].make(None)
    engine = OffloadEngine(*take_apart(config), plan, strategy, kernels="xla", layers_per_copy=2)
    offloaded = engine.generate(prompts, **how).finish()
    wanted = Engine(random_model(config)).generate(prompts, **how).finish()
    assert offloaded.token_ids == wanted.token_ids
    for found, expected in zip(offloaded.routing, wanted.routing, strict=True):
        np.testing.assert_array_equal(found.experts, expected.experts)
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    assert offloaded.counts is not None
    assert offloaded.counts.shape == (8, 1, len(COUNTS))
    assert (offloaded.counts[..., 0] > TOPK).all()


def refusal(call) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.hint
    return caught.value.cause


def test_an_oracle_without_a_future_is_refused():
    engine = make_engine("oracle", ALL)
    assert "oracle" in refusal(lambda: engine.program(1, 64))
    assert "oracle" in refusal(lambda: engine.generate([[1]], max_new_tokens=2))


def test_parts_that_do_not_fit_are_refused():
    model, store = parts()
    strategy = STRATEGIES["lru"].make(None)
    fewer = ExpertStore(store.layout, store.layers[1:])
    assert "(3, 12" in refusal(lambda: OffloadEngine(model, fewer, ALL, strategy))
    narrow = ExpertStore(store.layout._replace(ffn=4), store.layers)
    assert "4" in refusal(lambda: OffloadEngine(model, narrow, ALL, strategy))
    for slots in [(4, 4), (4, 4, 13)]:
        plan = SlotPlan("layer", slots)
        cause = refusal(lambda plan=plan: OffloadEngine(model, store, plan, strategy))
        assert f"{max(slots)} slots" in cause
    for kernels in ("cuda", "pallas"):
        cause = refusal(
            lambda kernels=kernels: OffloadEngine(model, store, ALL, strategy, kernels=kernels)
        )
        assert "kernels" in cause


@pytest.mark.parametrize(("layers", "width"), [(2, 6), (3, 5), (3, 8)])
def test_a_replay_of_another_model_is_refused(layers, width):
    engine = make_engine("lru", ALL)
    experts = np.zeros((5, layers, width), np.uint8)
    assert f"{width} experts" in refusal(lambda: engine.replay_table(experts, 2))


def test_device_bytes_are_those_of_the_arrays():
    engine = make_engine("lru", PLANS["layer", 1][0])
    state = engine.new_state(2, 32)
    assert engine.device_bytes["slots"] == state.experts.slots.nbytes
    assert state.experts.slots.nbytes == 9 * engine.sizes.num_rows * WITH_A_GAP.hidden_size * 4
    assert engine.device_bytes["dense"] > 0
