"""Warm slots: decode goes on as if the prompts' last tokens had been decoded before."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from moejax.bench import Rig, random_rig
from moejax.bench._engine_counts import first_difference, simulated_counts
from moejax.engine import OffloadEngine
from moejax.engine._event import Tables
from moejax.engine._expert_cache import ExpertCache
from moejax.engine._programs import ProgramSettings, fill_up, prompt_bucket
from moejax.engine._warm import WARM_STEPS
from moejax.offload import SlotPlan
from moejax.strategies import STRATEGIES

from ._tiny import CONFIG

NUM_LAYERS, NUM_EXPERTS, TOPK, NUM_NEW = 3, 6, 2, 9
SHAPE = replace(
    CONFIG, num_hidden_layers=NUM_LAYERS, mlp_only_layers=(), max_position_embeddings=256
)
# Layers differ, so that no layer's slots or rows can stand for another's.
PLAN = SlotPlan("layer", (3, 1, 4))
# The first is longer than what is looked at; the second begins when the others are under way.
SEVERAL = (41, 3, 33)
NO_EXPERT = 255


@pytest.fixture(scope="module")
def rig() -> Rig:
    return random_rig(SHAPE, name="tiny", dtype="float32", kernels="xla", seed=3)


@pytest.fixture(scope="module")
def engine(rig) -> Callable[[str], OffloadEngine]:
    """Engines by their strategies, which prefetch nothing."""
    return cache(lambda name: rig.engine(PLAN, STRATEGIES[name].make(None)._replace(reach=0)))


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("lru", SEVERAL), ("lfu", SEVERAL), ("fifo", SEVERAL), ("lru", (41,)), ("lru", (5,))],
)
def test_every_step_counts_what_the_replay_of_the_last_tokens_counts(engine, name, lengths):
    options = {"max_new_tokens": NUM_NEW, "record": True}
    generation = engine(name).generate(_prompts(lengths), **options).finish()
    routing = [(r.experts, length) for r, length in zip(generation.routing, lengths, strict=True)]
    simulated = simulated_counts(
        STRATEGIES[name].make(None),
        PLAN,
        _last_steps(routing),
        num_experts=NUM_EXPERTS,
        topk=TOPK,
        num_rows=3 * SHAPE.moe_intermediate_size,
    )
    assert len(simulated) == min(WARM_STEPS, max(lengths)) + NUM_NEW - 1
    assert first_difference(generation.counts, simulated[1 - NUM_NEW :]) is None


@pytest.mark.parametrize("name", ["lru", "fifo", "intelligent"])
def test_the_directory_is_that_of_the_replay(engine, name):
    """Whatever a strategy remembers; which slot an expert has does not matter."""
    (_, warm), routing = _begin(engine(name), SEVERAL)
    replayed = _replay(engine(name), routing, len(SEVERAL)).tables
    assert warm.step.tolist() == [WARM_STEPS]
    np.testing.assert_array_equal(warm.slot_of >= 0, replayed.slot_of >= 0)
    for ours, theirs in zip(*map(_memory, (warm, replayed)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("name", ["lru", "gate_look"])
def test_slots_hold_the_experts_that_the_directory_names(rig, name):
    """Also where experts are going to be prefetched."""
    (slots, tables), _ = _begin(rig.engine(PLAN, STRATEGIES[name].make(None)), SEVERAL)
    assert not tables.job.any()
    slot_of = np.asarray(tables.slot_of)[:NUM_LAYERS]
    assert (slot_of >= 0).sum(1).tolist() == [*PLAN.slots]
    assert sorted(slot_of[slot_of >= 0]) == list(range(PLAN.num_slots))
    for layer, expert in np.argwhere(slot_of >= 0):
        slot = slot_of[layer, expert]
        np.testing.assert_array_equal(slots[slot], rig.store.layers[layer][expert])


def test_prompts_of_a_bucket_share_a_compile(rig):
    engine = rig.engine(PLAN, STRATEGIES["lru"].make(None))
    for length in (40, 41):
        _begin(engine, (length,))
    assert engine._warm_up is not None
    assert engine._warm_up.num_compiles == {"fill": 1, "learn": 1}


@pytest.mark.parametrize("plan", [SlotPlan("pool", (8,)), SlotPlan("layer", (0, 0, 0))])
def test_a_pool_and_no_slots_start_cold(rig, plan):
    (_, tables), _ = _begin(rig.engine(plan, STRATEGIES["lru"].make(None)), (5,))
    assert not (np.asarray(tables.slot_of) >= 0).any()
    assert tables.step.tolist() == [0]


def _prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, SHAPE.vocab_size, length).tolist() for length in lengths]


def _last_steps(routing: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Routing of the prompts' last tokens, their ends side by side, and of what follows.

    Args:
      routing: Experts of each request's tokens, and how many are the prompt's.
    """
    num_warm = min(WARM_STEPS, max(length for _, length in routing))
    rows = [experts[max(0, length - num_warm) :] for experts, length in routing]
    steps = np.full((max(map(len, rows)), NUM_LAYERS, len(rows), TOPK), NO_EXPERT, np.uint8)
    for place, experts in enumerate(rows):
        steps[len(steps) - len(experts) :, :, place] = experts
    return steps.reshape(*steps.shape[:2], -1)


def _begin(engine: OffloadEngine, lengths: tuple[int, ...]) -> tuple[ExpertCache, np.ndarray]:
    """The experts behind the prompts, and the routing that led to them."""
    bucket = prompt_bucket(max(lengths))
    settings = ProgramSettings(len(lengths), bucket, 80, is_greedy=True, is_recording=True)
    engine._prepare_prefill(settings)
    prompts = fill_up([np.array(prompt, np.int32) for prompt in _prompts(lengths)], bucket)
    (_, experts), _, _, routed = engine._begin(settings, *prompts, None)
    assert routed is not None
    ids = [np.asarray(row)[:length] for row, length in zip(routed.experts, lengths, strict=True)]
    return experts, _last_steps(list(zip(ids, lengths, strict=True)))


def _replay(engine: OffloadEngine, routing: np.ndarray, batch_size: int) -> ExpertCache:
    """The experts after a routing was decoded from empty slots."""
    program = engine.program(batch_size, 64, num_steps=len(routing), is_replayed=True)
    table = engine.replay_table(routing, batch_size)
    return program(engine.new_state(batch_size, 64), None, table)[0].experts


def _memory(tables: Tables) -> list[np.ndarray]:
    """All that later steps read, but for the slots' numbers."""
    fields = (tables.score, tables.demand, tables.resident, tables.said, tables.step, tables.job)
    return [np.asarray(leaf) for leaf in (*fields, *jax.tree.leaves(tables.state))]
