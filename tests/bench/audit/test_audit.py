"""The rows: one a claim, judged by rule, each with a way back to its numbers."""

import dataclasses

import numpy as np
import pytest

from moejax.bench.audit._quantity import Assumption, Quantity, judge
from moejax.bench.audit._view import Found, MissingError, View, cells_by_key, find
from moejax.claims import list_claims, load_claims

from ...report._factory import results
from .._made_up_study import NUM_RUNS, audited_results, make_audit, make_cells

VERDICTS = {"reproduced", "not reproduced", "contradicts itself", "depends on assumption"}


@pytest.fixture(scope="module")
def audited() -> dict:
    return audited_results()


@pytest.fixture(scope="module")
def rows(audited) -> dict:
    return {row["claim"]: row for row in audited["audit"]}


def resolve(content, pointer: str):
    """What a JSON pointer points to."""
    for part in pointer.removeprefix("/").split("/"):
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


def test_every_claim_has_a_row_and_every_conflict_is_flagged(audited, rows):
    claims = load_claims()
    assert [row["claim"] for row in audited["audit"]] == [c.path for c in list_claims(claims)]
    flagged = {name for row in rows.values() for name in row["conflicts"]}
    assert flagged == {entry["id"] for entry in claims["known_conflicts"]}
    assert {row["verdict"] for row in rows.values()} == VERDICTS
    assert all(row["reason"] and "{" not in row["reason"] for row in rows.values())


def test_few_claims_have_nothing_beside_them(rows):
    without = [path for path, row in rows.items() if row["ours"] is None]
    assert all(rows[path]["verdict"] == "not reproduced" for path in without)
    assert len(without) == 6
    assert {path.split(".")[-1] for path in without} == {
        "complexity", "development time < 3 months",
    }  # fmt: skip


def test_sources_lead_to_the_numbers(audited, rows):
    row = rows["hit_rate_percent.intelligent.mean"]
    cells = [resolve(audited, place) for place in row["sources"]]
    assert [cell["batch_size"] for cell in cells] == [1, 2, 4, 8, 16]
    assert row["ours"] == pytest.approx(100 * np.mean([cell["hit_ratio"] for cell in cells]))
    assert row["source"] == row["sources"][0]
    for one in rows.values():
        assert (one["ours"] is None) == (one["source"] is None)
        assert all(resolve(audited, place) is not None for place in one["sources"])


def test_assumptions_are_lifted(rows):
    scaling = rows["latency_ms.on_demand.scaling_factor"]
    assert scaling["ours"] == pytest.approx(16)
    assert scaling["ours_otherwise"] == pytest.approx(16**0.7)
    assert scaling["verdict"] == "depends on assumption"
    assert "one after another" in scaling["assumption"]
    hits = rows["hit_rate_percent.intelligent.mean"]
    assert hits["verdict"] == "depends on assumption"
    assert hits["ours_otherwise"] == pytest.approx(78 * (2 / 32) ** 0.7, rel=0.01)
    experts = rows["memory.oracle.mb_per_expert"]
    assert (experts["ours"], experts["ours_otherwise"]) == (27.5, pytest.approx(17.3, abs=0.01))


def test_the_run_s_own_model_stands_beside(audited, rows):
    own = [record["hit_ratio"] for record in audited["grid"] if record["strategy"] == "intelligent"]
    assert rows["hit_rate_percent.intelligent.mean"]["ours_real"] == pytest.approx(
        100 * np.mean(own)
    )
    assert rows["switch_transformer.num_experts"]["ours_real"] is None


def test_what_the_run_lacks_is_left_empty():
    content = results(strategies=("lru",), batch_sizes=(2,), num_runs=1)
    content["baseline"] = []
    for record in content["grid"]:
        record["num_prefetches"] = 0
    rows = {row["claim"]: row for row in make_audit(content, num_runs=1)["audit"]}
    assert rows["latency_ms.oracle.batch1_mean"]["ours_real"] is None
    assert rows["latency_ms.oracle.batch1_mean"]["interval"] is None
    assert rows["latency_ms.oracle.batch1_std"]["ours"] is None
    assert rows["latency_ms.oracle.batch1_std"]["verdict"] == "not reproduced"


def test_intervals_are_those_of_the_runs(rows):
    row = rows["latency_ms.intelligent.batch1_mean"]
    low, high = row["interval"]
    assert low < row["ours"] < high
    assert row["interval_percent"] == 95
    samples = next(cell["latency_s"] for cell in make_cells() if cell["strategy"] == "intelligent")
    assert 1e3 * min(samples) <= low < high <= 1e3 * max(samples)
    assert rows["switch_transformer.max_speedup"]["interval"] is None


ASSUMED = Assumption("so", "elsewhere")


@pytest.mark.parametrize(
    ("changes", "claimed", "ours", "otherwise", "verdict"),
    [
        ({}, 100.0, Found(91.0, None, ()), None, "reproduced"),
        ({}, 100.0, Found(89.0, None, ()), None, "not reproduced"),
        ({}, 100.0, Found(80.0, (75.0, 91.0), ()), None, "reproduced"),
        ({}, 100.0, None, None, "not reproduced"),
        (
            {"assumption": ASSUMED}, 100.0, Found(99.0, None, ()), Found(99.0, None, ()),
            "reproduced",
        ),
        (
            {"assumption": ASSUMED}, 100.0, Found(99.0, None, ()), Found(9.0, None, ()),
            "depends on assumption",
        ),
        (
            {"assumption": ASSUMED}, 100.0, Found(9.0, None, ()), Found(99.0, None, ()),
            "not reproduced",
        ),
        ({"relation": "over"}, 99.0, Found(100.0, None, ()), None, "reproduced"),
        ({"relation": "over"}, 99.0, Found(80.0, None, ()), None, "not reproduced"),
        ({"relation": "under"}, 2.0, Found(25.0, None, ()), None, "not reproduced"),
        ({"relation": "over", "expected": 0.0}, "in words", Found(0.0, None, ()), None,
         "not reproduced"),
        ({}, "oracle", Found("oracle", None, ()), None, "reproduced"),
        ({}, "oracle", Found("beaten by lru", None, ()), None, "not reproduced"),
    ],
)  # fmt: skip
def test_verdicts_follow_from_the_numbers(changes, claimed, ours, otherwise, verdict):
    quantity = Quantity("", None, "", **changes)
    assert judge(quantity, claimed, ours, otherwise, is_contradicted=False) == verdict
    contradicted = judge(quantity, claimed, ours, otherwise, is_contradicted=True)
    assert contradicted == "contradicts itself"


def test_a_view_finds_or_says_nothing():
    view = View(cells_by_key(make_cells(), "/study/grid"), "batched", 2)
    assert view.batch_sizes == (1,)
    found = find(lambda v: v.mean("oracle", "hit_ratio"), view)
    assert found is not None
    assert found.reads == ("/study/grid/25",)
    assert find(lambda v: v.mean("oracle", "hit_ratio", 16), view) is None
    assert find(lambda v: v.fact("unheard of"), view) is None
    with pytest.raises(MissingError):
        view.runs("belady", "hit_ratio")
    first = dataclasses.replace(view, draws=np.zeros((3, NUM_RUNS), int))
    assert len(set(first.runs("oracle", "hit_ratio").ravel())) == 1
