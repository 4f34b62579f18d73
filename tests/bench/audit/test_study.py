"""The study's experiment, on a tiny model."""

import dataclasses
import json

import pytest

from moejax.bench import learn, open_requests, run_grid
from moejax.bench.audit import StudySlots, run_audit, run_study, slots_of_study, study_settings
from moejax.bench.audit._facts import machine_facts, study_facts
from moejax.bench.audit._study import by_run
from moejax.cards import load_hardware, load_model
from moejax.claims import load_claims

from ...report._factory import results as made_up_results
from ..test_experiment import make_trace

MODEL, HARDWARE = load_model("tiny-moe"), load_hardware("rtx-3090")
SLOTS = StudySlots(stated=6, in_bytes=1, in_tiers=3)
STRATEGIES = ("top_k", "lru")


@pytest.fixture(scope="module")
def requests():
    # Requests as long as a run, so that place p has request p at any batch size.
    trace = make_trace(num_requests=12)
    return open_requests(trace, "", MODEL, 0)


@pytest.fixture(scope="module")
def settings():
    return dataclasses.replace(
        study_settings(SLOTS, MODEL, num_runs=2, seed=0),
        strategies=STRATEGIES,
        batch_sizes=(1, 2),
        num_steps=3,
        num_warmup_steps=0,
    )


@pytest.fixture(scope="module")
def cells(settings, requests):
    grid = run_study(settings, SLOTS, MODEL, HARDWARE, requests, learn(requests))
    keys = ("strategy", "batch_size", "dispatch", "slots")
    return {tuple(cell[key] for key in keys): cell for cell in grid}


def test_the_study_s_slots_follow_from_its_claims():
    assert slots_of_study(load_claims(), load_model("reference-study")) == StudySlots(32, 2, 9)


def test_cells_are_those_of_the_grid(cells, settings, requests):
    """One long sequential replay answers for every batch size, and slots are lanes."""
    own = dataclasses.replace(settings, strategies=("top_k",))
    grid = run_grid(own, MODEL, HARDWARE, requests, learn(requests))
    for size in settings.batch_sizes:
        for dispatch in settings.dispatches:
            records = [r for r in grid if (r["batch_size"], r["dispatch"]) == (size, dispatch)]
            expected = by_run(records)
            cell = cells["top_k", size, dispatch, 6]
            for field in ("hit_ratio", "latency_s", "fetched_bytes", "p99_s"):
                assert cell[field] == pytest.approx(expected[field], rel=1e-5), (size, dispatch)


def test_baseline_runs_alone_at_batch_1(cells):
    assert ("lru", 1, "sequential", 6) in cells
    assert ("lru", 2, "sequential", 6) not in cells
    assert (
        cells["lru", 1, "sequential", 6]["hit_ratio"] == cells["lru", 1, "batched", 6]["hit_ratio"]
    )


def test_more_slots_hit_more(cells):
    slots = sorted(key[3] for key in cells if key[:3] == ("lru", 1, "batched"))
    assert {1, 3, 6} <= set(slots)
    hits = [sum(cells["lru", 1, "batched", one]["hit_ratio"]) for one in slots]
    assert hits == sorted(hits)
    assert hits[0] < hits[-1]


def test_facts_are_arithmetic(requests):
    facts = study_facts(load_claims(), MODEL, HARDWARE, requests, learn(requests), 0)
    assert facts["switch.expert_mb"] == pytest.approx(4 * 2 * 768 * 3072 / 1e6)
    assert 1 < facts["switch.least_speedup"] < facts["switch.most_speedup"]
    assert 60 < facts["switch.hit_percent"] < 90
    shares = [facts[f"tier_share_percent.{tier}"] for tier in ("l1", "l2", "l3")]
    # The tiny model fits into the first two tiers.
    assert shares[-1] == pytest.approx(0)
    assert 0 < sum(shares) <= 100
    assert facts["expert_mb"] == pytest.approx(3 * 3584 * 2560 / 1e6)


def test_a_cache_competes_with_dense_weights():
    model = load_model("reference-study")
    facts = machine_facts(model, HARDWARE)
    left = facts["vram_gb.RTX 3090"] - facts["available_gb.RTX 3090"]
    assert model.dense_bytes / 1e9 < left < 1.2 * model.dense_bytes / 1e9
    assert facts["usd_per_byte"] * HARDWARE.value("vram_bytes") == pytest.approx(1499)


def test_audit_of_a_short_study(monkeypatch):
    """The whole way in the study's own geometry, with a few steps of a few requests."""

    def short(slots, model, *, num_runs, seed):
        settings = study_settings(slots, model, num_runs=num_runs, seed=seed)
        return dataclasses.replace(
            settings,
            strategies=("on_demand",),
            batch_sizes=(1, 16),
            num_steps=2,
            num_warmup_steps=1,
        )

    monkeypatch.setattr("moejax.bench.audit._audit.study_settings", short)
    content = made_up_results(num_runs=2)
    content["baseline"] = []
    for record in content["grid"]:
        record["num_prefetches"] = 0
    told = []
    found = run_audit(
        content, MODEL, HARDWARE, num_runs=2, seed=3, progress=lambda *said: told.append(said)
    )
    json.dumps(found, allow_nan=False)
    rows = {row["claim"]: row for row in found["audit"]}
    assert len(rows) == 177
    assert rows["latency_ms.on_demand.scaling_factor"]["ours"] == pytest.approx(16, rel=1e-3)
    assert rows["latency_ms.on_demand.scaling_factor"]["ours_otherwise"] < 12
    assert rows["tier_roles.l1"]["ours"] == 0
    assert found["study"]["settings"]["num_runs"] == 2
    assert told[0] == (0, 1, "audit: on_demand")
    # Strategies that were not run have rows that say so.
    assert rows["latency_ms.oracle.batch1_mean"]["ours"] is None
