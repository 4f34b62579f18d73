"""The plan: what the acceptance of `tune-cache` asks for."""

import json
import time

import numpy as np
import pytest

from moejax.cards import load_model
from moejax.errors import UsageError
from moejax.tune import tier_problem, tune

from ._tiers import EXPERT_BYTES, HARDWARE, concave_curve, problem, ragged_curve

KEYS = {
    "budget_bytes",
    "used_bytes",
    "model",
    "hardware",
    "strategy",
    "tiers",
    "step_latency_s",
    "hit_ratio",
    "fetched_bytes",
    "uniform_step_latency_s",
    "optimum_gap_ratio",
    "marginal_s_per_100mb",
    "warnings",
}


@pytest.mark.parametrize("num_gb", [0.1, 2, 8, 20])
def test_qwen_budgets(num_gb):
    model = load_model("qwen1.5-moe-a2.7b")
    asked = tier_problem(
        HARDWARE, model, concave_curve(24, 60), np.full(24, 4.0), budget_bytes=int(num_gb * 1e9)
    )
    started_s = time.perf_counter()
    plan = tune(asked)
    assert time.perf_counter() - started_s < 20
    num_slots = sum(plan.tiers[0].experts_per_layer)
    assert num_slots == int(num_gb * 1e9) // model.expert_bytes
    assert plan.used_bytes == num_slots * model.expert_bytes <= plan.budget_bytes
    assert plan.step_latency_s <= plan.uniform_step_latency_s
    assert plan.step_latency_s <= plan.uniform_optimum_step_latency_s
    assert 0 <= plan.optimum_gap_ratio <= 0.01
    assert plan.marginal_s_per_100mb < 0
    assert plan.prefetch_share_ratio == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", ["latency", "bytes"])
def test_near_the_optimum_on_curves_with_cliffs(seed, objective):
    asked = problem(ragged_curve(6, 12, seed), num_slots=21, num_pinned=72)
    plan = tune(asked, objective)
    assert plan.optimum_gap_ratio <= 1e-5
    assert plan.gradient_gap_ratio >= plan.optimum_gap_ratio
    if objective == "latency":
        assert plan.step_latency_s <= plan.uniform_step_latency_s
        assert plan.gain_over_uniform_ratio >= 0


def test_is_never_better_than_the_bound():
    for num_slots in (2, 9, 40, 72):
        plan = tune(problem(num_slots=num_slots))
        assert 0 <= plan.optimum_gap_ratio < 0.01


def test_more_memory_never_slows_the_plan():
    plans = [tune(problem(num_slots=num_slots)) for num_slots in (1, 10, 30, 50, 72)]
    latencies_s = [plan.step_latency_s for plan in plans]
    assert latencies_s == sorted(latencies_s, reverse=True)


def test_is_deterministic_for_a_seed():
    asked = problem(ragged_curve(6, 12, 9), num_slots=21, num_pinned=30)
    assert tune(asked, seed=4).to_json() == tune(asked, seed=4).to_json()


def test_everything_fits():
    plan = tune(problem(num_slots=500))
    assert plan.tiers[0].experts_per_layer == (12,) * 6
    assert plan.used_bytes == 72 * EXPERT_BYTES
    assert plan.hit_ratio == 1
    assert plan.fetched_bytes == 0
    assert plan.marginal_s_per_100mb == 0
    assert plan.warnings == ("Every expert fits on the device: there is nothing left to tune.",)


def test_percentile_objective():
    rng = np.random.default_rng(0)
    # Two layers are calm on average and demand much at times.
    scale = np.where(np.arange(6) < 2, rng.choice([0.2, 3.0], (200, 1), p=[0.9, 0.1]), 1.0)
    samples = 2 * (1 - concave_curve(seed=1)) * scale[:, :, None]
    mean = samples.mean(axis=0)
    curve = 1 - mean / mean[:, :1]
    asked = problem(curve, num_slots=24, sample_misses=samples)
    tail, usual = tune(asked, "p99"), tune(asked)
    assert tail.p99_latency_s < usual.p99_latency_s
    assert tail.p99_latency_s <= tail.uniform_p99_latency_s
    assert any("100 steps the plan was not tuned on" in warning for warning in tail.warnings)


def test_percentile_needs_samples():
    with pytest.raises(UsageError) as caught:
        tune(problem(num_slots=24), "p99")
    assert "--objective" in caught.value.hint


def test_unknown_objective():
    with pytest.raises(UsageError) as caught:
        tune(problem(num_slots=24), "speed")
    assert "latency, p99, bytes" in caught.value.hint


def test_bytes_objective_moves_fewest_bytes():
    asked = problem(num_slots=20, num_pinned=10, num_host=10)
    fewest, fastest = tune(asked, "bytes"), tune(asked)
    assert fewest.fetched_bytes <= fastest.fetched_bytes
    assert fewest.step_latency_s >= fastest.step_latency_s


def test_sure_prefetches_get_landing_slots():
    sure = tune(problem(num_slots=36, recall_ratio=1.0))
    plain = tune(problem(num_slots=36))
    assert sum(sure.prefetch_slots_per_layer[1:]) > 0
    assert sure.prefetch_slots_per_layer[0] == 0
    assert sure.step_latency_s < plain.step_latency_s
    assert sum(sure.tiers[0].experts_per_layer) <= 36


def test_json_is_plain_and_complete():
    plan = tune(problem(num_slots=24, num_pinned=20, num_host=10))
    record = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert set(record) >= KEYS
    assert [tier["name"] for tier in record["tiers"]] == ["L1", "L2", "L3"]
    assert [tier["memory"] for tier in record["tiers"]] == ["device", "pinned", "pageable"]
    for tier, most in zip(record["tiers"], (24, 20, 10), strict=True):
        assert tier["capacity_bytes"] == sum(tier["experts_per_layer"]) * EXPERT_BYTES
        assert sum(tier["experts_per_layer"]) <= most
    assert record["marginal_s_per_100mb"] == record["marginals_s_per_100mb"]["device"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_slots": 8}, "would never hit"),
        ({"num_slots": 8}, "fewer slots than experts demanded"),
        ({"num_slots": 8, "num_pinned": 10, "num_host": 0}, "read from the store"),
        ({"num_slots": 8, "strategy": "fifo"}, "approximate"),
        ({"num_slots": 24, "curve": np.tile(concave_curve(1), (6, 1))}, "tell apart"),
    ],
)
def test_warns(options, words):
    assert any(words in warning for warning in tune(problem(**options)).warnings)
