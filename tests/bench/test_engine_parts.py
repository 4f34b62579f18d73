import numpy as np
import pytest

from moejax.bench import (
    Ceilings,
    Routing,
    measure_contexts,
    measure_drift,
    measure_memory,
    trace_of_hit_ratio,
)
from moejax.bench._engine_parts import prefill_flops, steady_routing
from moejax.bench._engine_rig import step_sizes
from moejax.strategies import STRATEGIES

from ._engine_rig import NUM_EXPERTS, NUM_LAYERS, TINY, TOPK, tiny_rig

CEILINGS = Ceilings(1e9, 1e9, 1e9, {})


@pytest.fixture(scope="module")
def rig():
    return tiny_rig()


@pytest.fixture(scope="module")
def engine(rig):
    return rig.engine(rig.even_plan(TOPK, "layer"), STRATEGIES["lru"].make(None))


def test_a_context_is_set_against_what_it_adds(rig, engine):
    sizes = step_sizes(rig)
    first, second = measure_contexts(
        rig, engine, sizes, CEILINGS, (2, 42), num_steps=3, num_warmup=1
    )
    assert (first["context"], second["context"]) == (4.5, 44.5)
    assert first["bound_ratio"] is None
    assert second["added_bytes"] == 40 * sizes.position_bytes
    assert second["added_s"] == second["step_s"]["median"] - first["step_s"]["median"]
    assert second["bound_ratio"] == pytest.approx(second["added_s"] / second["added_bytes"] * 1e9)
    assert len(second["step_s"]["samples"]) == 3


def test_drift_compares_both_ends(engine):
    experts = trace_of_hit_ratio(5, NUM_LAYERS, NUM_EXPERTS, TOPK, 1, TOPK, 1.0)
    drift = measure_drift(engine, Routing("a", experts), num_steps=12, num_ends=4, context=3)
    samples = drift["samples_s"]
    # Three passes, each without the step that begins it.
    assert drift["num_steps"] == len(samples) == 12
    assert drift["first_s"] == np.median(samples[:4])
    assert drift["last_s"] == np.median(samples[-4:])
    assert drift["drift_ratio"] == pytest.approx(drift["last_s"] / drift["first_s"] - 1)


def test_memory_is_planned_from_slots_and_positions(rig, engine):
    found = measure_memory(rig, engine, batch_size=1, num_positions=9)
    sizes = step_sizes(rig)
    assert found["planned_bytes"] == {
        "slots": NUM_LAYERS * TOPK * sizes.expert_bytes,
        "keys_and_values": 9 * sizes.position_bytes,
    }


def test_a_steady_routing_demands_the_same_experts(rig):
    experts = steady_routing(rig, 4).experts
    assert experts.shape == (4, NUM_LAYERS, TOPK)
    assert (experts == np.arange(TOPK)).all()


def test_operations_of_a_prompt(rig):
    sizes = step_sizes(rig)
    head = TINY.vocab_size * TINY.hidden_size
    dense = sizes.dense_bytes // 4 - head
    chosen = TOPK * NUM_LAYERS * sizes.expert_bytes // 4
    width = TINY.num_attention_heads * TINY.head_dim
    attention = NUM_LAYERS * width * 10 * 11
    expected = 2 * (10 * (dense + chosen) + head + attention)
    assert prefill_flops(TINY, sizes, 10) == pytest.approx(expected)
