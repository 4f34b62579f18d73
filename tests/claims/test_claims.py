import copy
import json
from pathlib import Path

import pytest

from moejax.claims import contradictions, is_beaten, list_claims, load_claims, table

REFERENCE = Path(__file__).resolve().parents[3] / "shared/data/reference-study/claims.json"
NOT_AUDITED = ("title", "note", "design", "model", "figures", "future_work", "known_conflicts")
NAMES = ("columns", "id", "label")


def count_leaves(content) -> int:
    """Every number and statement, counted without the code under test."""
    if isinstance(content, dict):
        return sum(count_leaves(inner) for key, inner in content.items() if key not in NAMES)
    if isinstance(content, list):
        return sum(map(count_leaves, content))
    return content is not None


@pytest.fixture
def claims() -> dict:
    return copy.deepcopy(dict(load_claims()))


def test_every_leaf_is_a_claim_with_a_path_of_its_own(claims):
    audited = {name: content for name, content in claims.items() if name not in NOT_AUDITED}
    paths = [claim.path for claim in list_claims(claims)]
    assert len(paths) == count_leaves(audited) == 177
    assert len(set(paths)) == len(paths)


def test_paths_name_columns_and_count_lists(claims):
    values = {claim.path: claim.value for claim in list_claims(claims)}
    assert values["hit_rate_percent.oracle.mean"] == 89.4
    assert values["pareto.memory_vs_hit_rate.1"] == "intelligent"
    assert values["selection_rules.maximum performance.0"] == "oracle"
    assert "hit_rate_percent.on_demand.efficiency_score" not in values
    assert table(claims, "memory", "efficiency_score").keys() == set(claims["speedup"]) - {
        "columns"
    }


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the collection of sources is not here")
def test_the_copy_says_what_the_source_says(claims):
    source = json.loads(REFERENCE.read_text(encoding="utf-8"))
    assert {**claims, "note": ""} == {**source, "note": ""}


def test_contradictions_are_known_conflicts(claims):
    found = contradictions(claims)
    assert found["text_claims.p99_ms_under"] == "p99_below_1000ms"
    assert found["throughput_requests_per_s.oracle.batch16"] == "throughput_vs_latency"
    assert found["pareto.memory_vs_speedup.2"] == "pareto_dominated"
    assert "throughput_requests_per_s.oracle.batch1" not in found
    assert set(found) <= {claim.path for claim in list_claims(claims)}
    assert set(found.values()) <= {entry["id"] for entry in claims["known_conflicts"]}


def test_mended_claims_contradict_nothing(claims):
    claims["text_claims"] |= {"p99_ms_under": 1200, "hit_rate_percent_over": 75}
    claims["text_claims"]["memory_overhead_gb_under"] = 8
    claims["strategies"]["D"]["meaning"] = "static top-K most frequent experts (K=64)"
    for strategy, entry in claims["throughput_requests_per_s"].items():
        entry["batch16"] = 16 / (table(claims, "latency_ms", "batch16_mean")[strategy] * 1e-3)
    claims["pareto"] = {
        "memory_vs_speedup": ["on_demand", "oracle"],
        "complexity_vs_speedup": ["on_demand", "oracle"],
        "memory_vs_hit_rate": ["oracle"],
    }
    assert contradictions(claims) == {}


def test_equal_points_do_not_beat_each_other():
    assert is_beaten("a", {"a": 1, "b": 1}, {"a": 2, "b": 2}) is None
    assert is_beaten("a", {"a": 1, "b": 1}, {"a": 2, "b": 3}) == "b"
    assert is_beaten("a", {"a": 1, "b": 2}, {"a": 2, "b": 3}) is None
