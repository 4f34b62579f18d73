import dataclasses
import json

import jax
import numpy as np
import pytest

from moejax.bench import (
    ROUTER,
    Ceilings,
    EngineBench,
    EngineCase,
    EngineSettings,
    Routing,
    describe_bench,
    make_cases,
    run_cases,
    trace_of_hit_ratio,
    true_lookahead,
)
from moejax.bench._engine_ceilings import measure_ceilings, measure_host_reads
from moejax.bench._engine_check import is_identical, resident_transcript, transcript
from moejax.bench._engine_rig import step_sizes
from moejax.engine import COUNTS
from moejax.errors import UsageError
from moejax.results import to_plain
from moejax.strategies import STRATEGIES

from ._engine_rig import NUM_EXPERTS, NUM_LAYERS, TINY, TOPK, tiny_rig

SETTINGS = EngineSettings(num_steps=6, num_warmup_steps=2, num_check_steps=8, context=4)
CEILINGS = Ceilings(1e6, 1e7, 1e8, {})
PROMPTS = [[1, 2, 3], [4, 5]]
SLOTS = 3
ISSUE_FIELDS = {
    *("strategy", "slots", "scope", "batch_size", "replayed", "hit_ratio", "misses_per_step"),
    *("late_per_step", "fetched_bytes_per_step", "step_s", "device_bytes_per_step"),
    *("link_bytes_per_s", "hbm_bytes_per_s", "bound_sum_s", "bound_max_s", "bit_identical"),
    "simulator_counts_equal",
}


@pytest.fixture(scope="module")
def rig():
    return tiny_rig()


@pytest.fixture(scope="module")
def routing():
    experts = trace_of_hit_ratio(8, NUM_LAYERS, NUM_EXPERTS, TOPK, 1, SLOTS, 0.5, seed=1)
    return Routing("half", experts, true_lookahead(experts, 1))


@pytest.fixture(scope="module")
def bench(rig):
    return EngineBench(rig, SETTINGS, None, CEILINGS, step_sizes(rig))


@pytest.fixture(scope="module")
def results(bench, routing):
    """A replay with prefetch and a generation, through the real engine."""
    cases = [
        EngineCase("gate_look", SLOTS, "layer", 1, "half"),
        EngineCase("lru", SLOTS, "pool", 1, ROUTER),
    ]
    return run(bench, cases, {("half", 1): routing})


def run(bench, cases, routings, before=None, save=lambda results: None):
    results = describe_bench(bench) if before is None else before
    return run_cases(bench, cases, results, routings=routings, prompts=PROMPTS, save=save)


def test_a_record_has_the_documented_fields(results):
    assert [row["replayed"] for row in results["engine"]] == [True, False]
    for row in results["engine"]:
        assert set(row) >= ISSUE_FIELDS
        assert set(row["step_s"]) == {"median", "p95", "samples"}
        assert len(row["step_s"]["samples"]) == SETTINGS.num_steps
        assert {len(values) for values in row["steps"].values()} == {SETTINGS.num_steps}
    assert results["failed"] == []
    assert {"schema", "environment", "model", "settings", "ceilings", "sizes"} <= set(results)
    json.dumps(to_plain(results))


def test_bits_and_counts_are_compared(results):
    for row in results["engine"]:
        assert row["bit_identical"] is True
        assert row["num_identity_steps"] == SETTINGS.num_check_steps
        assert row["num_identity_misses"] > 0
        assert row["simulator_counts_equal"] is True


def test_bounds_are_arithmetic_on_what_was_moved(results, bench):
    sizes = bench.sizes
    for row in results["engine"]:
        steps = {name: np.mean(values) for name, values in row["steps"].items()}
        length = SETTINGS.context if row["replayed"] else len(PROMPTS[0])
        context = length + (SETTINGS.num_warmup_steps + SETTINGS.num_all_steps) / 2
        device_bytes = sizes.dense_bytes + row["batch_size"] * context * sizes.position_bytes
        device_bytes += steps["hits"] * sizes.expert_bytes
        assert row["device_bytes_per_step"] == pytest.approx(device_bytes)
        link_s, device_s = steps["fetched_bytes"] / 1e6, device_bytes / 1e7
        assert row["bound_sum_s"] == pytest.approx(link_s + device_s)
        assert row["bound_max_s"] == pytest.approx(max(link_s, device_s))
        assert row["bound_sum_ratio"] == pytest.approx(
            row["step_s"]["median"] / (link_s + device_s)
        )
        demands = steps["hits"] + steps["late"] + steps["misses"]
        assert row["hit_ratio"] == pytest.approx(steps["hits"] / demands)


def test_dense_bytes_leave_out_experts_and_the_embedding(rig):
    heads, width = TINY.num_attention_heads + 2 * TINY.num_key_value_heads, TINY.head_dim
    hidden, shared = TINY.hidden_size, TINY.shared_expert_intermediate_size
    layer = 2 * hidden + heads * width * (hidden + 1) + hidden * hidden
    layer += (NUM_EXPERTS + 1 + 3 * shared) * hidden
    head = TINY.vocab_size * hidden + hidden
    sizes = step_sizes(rig)
    assert sizes.dense_bytes == 4 * (NUM_LAYERS * layer + head)
    assert sizes.position_bytes == 4 * NUM_LAYERS * 2 * TINY.num_key_value_heads * width
    assert sizes.expert_bytes == 4 * 3 * hidden * TINY.moe_intermediate_size


def test_what_is_measured_already_is_left_out(bench, routing, results):
    before = dict(results, engine=list(results["engine"]))
    cases = [EngineCase("gate_look", SLOTS, "layer", 1, "half")]
    saved = []
    after = run(bench, cases, {("half", 1): routing}, before, saved.append)
    assert after["engine"] == results["engine"]
    assert saved == []


def test_an_interrupt_leaves_what_was_saved(bench, routing, monkeypatch):
    records = iter([{"strategy": "lru"}])

    def measure(self, case, **given):
        try:
            return next(records)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(EngineBench, "measure", measure)
    saved = []
    cases = list(make_cases(["lru"], [1, 2], ["layer"], [1], [ROUTER], num_experts=NUM_EXPERTS))
    with pytest.raises(KeyboardInterrupt):
        run(bench, cases, {}, save=lambda results: saved.append(len(results["engine"])))
    assert saved == [1]


def test_a_case_without_room_is_noted_and_the_next_goes_on(bench, monkeypatch, capsys):
    def measure(self, case, **given):
        if case.slots == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")
        return {"strategy": "lru"}

    monkeypatch.setattr(EngineBench, "measure", measure)
    cases = list(make_cases(["lru"], [1, 2], ["layer"], [1], [ROUTER], num_experts=NUM_EXPERTS))
    after = run(bench, cases, {})
    assert after["engine"] == [{"strategy": "lru"}]
    (failed,) = after["failed"]
    assert (failed["slots"], failed["error"]) == (1, "RESOURCE_EXHAUSTED: out of memory")
    assert "out of memory" in capsys.readouterr().err


def test_another_model_is_told_apart_by_its_bits(rig):
    """The check of bits can fail."""
    resident = resident_transcript(rig, 1, 4, seed=3)
    assert resident.num_misses == 0
    other = dataclasses.replace(rig, store=tiny_rig(seed=9).store)
    engine = other.engine(other.even_plan(SLOTS, "layer"), STRATEGIES["lru"].make(None))
    assert not is_identical(transcript(engine, 1, 4, seed=3), resident)


def test_a_pool_for_what_keeps_layers_apart_is_refused_before_anything_runs():
    with pytest.raises(UsageError, match="sieve keeps each layer apart"):
        list(make_cases(["lru", "sieve"], [2], ["layer", "pool"], [1], ["a"], num_experts=6))


def test_cases_are_every_combination():
    cases = list(make_cases(["lru", "lfu"], [2, 4], ["pool"], [1, 3], ["a"], num_experts=6))
    assert len(cases) == len(set(cases)) == 8
    assert cases[0] == EngineCase("lru", 2, "pool", 1, "a")


@pytest.mark.parametrize(
    ("names", "slots", "words"), [(["lru"], [7], "--slots 7"), (["oracle"], [2], "oracle")]
)
def test_impossible_cases_are_refused(names, slots, words):
    with pytest.raises(UsageError, match=words):
        list(make_cases(names, slots, ["layer"], [1], [ROUTER], num_experts=6))


def test_a_strategy_without_its_profile_is_refused(bench):
    with pytest.raises(UsageError, match="top_k needs a profile"):
        bench.strategy("top_k")


def test_rates_and_host_reads_are_those_of_their_samples(rig):
    layer = rig.store.layers[0]
    ceilings = measure_ceilings(layer, (TINY.vocab_size, TINY.hidden_size))
    assert set(ceilings.samples) == {"link", "reduction", "head", "product"}
    assert min(ceilings[:3]) > 0
    idle, busy = measure_host_reads(layer)
    assert (idle["is_host_busy"], busy["is_host_busy"]) == (False, True)
    assert idle["num_bytes"] == rig.store.layout.expert_bytes
    assert idle["bandwidth_bytes_per_s"] == pytest.approx(idle["num_bytes"] / idle["median_s"])


def test_counts_have_the_columns_that_records_read():
    assert {"demands", "hits", "late", "misses", "prefetches", "fetched_rows"} == set(COUNTS)
