"""Predicted, simulated and measured steps side by side, on a real engine and on made rows."""

import copy
import json

import numpy as np
import pytest

from moejax.bench import (
    EngineBench,
    EngineCase,
    EngineSettings,
    RoutingRecipe,
    describe_bench,
    ladder,
    make_profile,
    make_routing,
    run_cases,
    summarise_ladder,
)
from moejax.bench._engine_rig import step_sizes
from moejax.bench._ladder_baselines import DATASHEETS
from moejax.bench._ladder_parts import find_contrasts
from moejax.cards import load_hardware
from moejax.cost import CountedCase
from moejax.results import to_plain

from ._engine_rig import TINY, tiny_rig
from .test_engine_run import CEILINGS, SLOTS

RECIPE = RoutingRecipe("hit_ratio", 8, 1, slots=SLOTS, hit_ratio=0.5)
SETTINGS = EngineSettings(num_steps=6, num_warmup_steps=2, context=4, is_checked=False)
HARDWARE = load_hardware("h100")


@pytest.fixture(scope="module")
def measured() -> dict:
    """A strategy with prefetch and one without, through the real engine."""
    rig = tiny_rig()
    bench = EngineBench(
        rig, SETTINGS, make_profile(RECIPE, TINY, "tiny"), CEILINGS, step_sizes(rig)
    )
    routing = make_routing(RECIPE, TINY, "tiny", 1)
    cases = [EngineCase(name, SLOTS, "layer", 1, routing.name) for name in ("gate_look", "lru")]
    results = run_cases(
        bench,
        cases,
        describe_bench(bench),
        routings={(routing.name, 1): routing},
        prompts=[],
        save=lambda _: None,
    )
    for row in results["engine"]:
        row |= {"recipe": RECIPE._asdict(), "fit": row["strategy"] == "lru"}
    return json.loads(json.dumps(to_plain(results)))


@pytest.fixture(scope="module")
def rows(measured) -> list[dict]:
    return ladder(measured, HARDWARE)


def test_every_case_is_predicted_simulated_and_measured(rows, measured):
    assert [(row["strategy"], row["is_held_out"]) for row in rows] == [
        ("gate_look", True),
        ("lru", False),
    ]
    for row, record in zip(rows, measured["engine"], strict=True):
        assert row["measured_s"] == record["step_s"]["median"]
        assert row["counts_equal"] is True
        assert row["predicted_s"] == pytest.approx(
            sum(part["predicted_s"] for part in row["parts"].values()), rel=1e-5
        )
        assert row["error_ratio"] == row["predicted_s"] / row["measured_s"] - 1
        # By the same constants, the closed form is near the timeline.
        assert row["simulated_s"] == pytest.approx(row["predicted_s"], rel=0.1)
        # This profile does not say how sure it is, and a CPU has no datasheet of a link.
        assert (row["interval_s"], row["roofline_s"]) == (None, None)
        assert row["two_constants_s"] > 0


def test_counts_that_differ_are_seen(measured):
    results = copy.deepcopy(measured)
    del results["engine"][0]
    results["engine"][0]["steps"]["misses"][0] += 1
    assert [row["counts_equal"] for row in ladder(results, HARDWARE)] == [False]


def test_routing_that_cannot_be_made_again_is_not_simulated(measured):
    results = copy.deepcopy(measured)
    results["engine"][0]["recipe"] = None
    results["engine"][1]["scope"] = "pool"
    rows = ladder(results, HARDWARE)
    assert [row["simulated_s"] for row in rows] == [None, None]
    assert [row["counts_equal"] for row in rows] == [True, True]


def test_only_held_out_cases_are_judged(rows):
    def row(error_ratio, interval_s, **given):
        parts = {name: {"predicted_s": 0.5, "measured_s": None} for name in rows[0]["parts"]}
        parts["copy"]["measured_s"] = 0.4
        base = {"predicted_s": 1 + error_ratio, "measured_s": 1.0, "interval_s": interval_s}
        base |= {"simulated_s": None, "roofline_s": 0.5, "two_constants_s": 0.8}
        base |= {"counts_equal": True, "is_held_out": True, "parts": parts}
        return base | given

    made = [
        row(0.1, [0.9, 1.2]),
        row(-0.02, [0.9, 0.97], counts_equal=False),
        row(0.04, None, counts_equal=None),
        row(9.0, [9.0, 11.0], is_held_out=False),
    ]
    summary = summarise_ladder(made)
    assert (summary["num_cases"], summary["num_counted"], summary["num_counts_equal"]) == (3, 2, 1)
    assert summary["errors"]["predicted"]["median_ratio"] == pytest.approx(0.04)
    assert summary["errors"]["predicted"]["worst_ratio"] == pytest.approx(0.1)
    assert summary["errors"]["simulated"] is None
    assert summary["errors"]["roofline"]["worst_ratio"] == pytest.approx(0.5)
    assert summary["coverage_ratio"] == 0.5
    assert summary["parts"]["copy"] == {
        "median_s": pytest.approx(0.1),
        "median_step_ratio": pytest.approx(0.1),
    }
    assert summary["parts"]["fixed"] is None
    assert summarise_ladder(made[3:])["coverage_ratio"] is None


def counted(strategy, batch_size, demands, misses, step_s):
    return CountedCase(strategy, batch_size, 100.0, demands, misses, 0.0, 0.0, step_s)


def test_parts_are_measured_by_differences():
    """A step of 1 ms, 2 us an expert, 10 ns a token of a request; oracle takes 0.1 ms more."""
    cases = [
        counted("lru", 1, 96.0, 0.0, 1e-3 + 192e-6 + 1e-6),
        counted("oracle", 1, 96.0, 0.0, 1.1e-3 + 192e-6 + 1e-6),
        counted("lru", 4, 96.0, 0.0, 2e-3 + 192e-6 + 4e-6),
        counted("lru", 4, 288.0, 0.0, 2e-3 + 576e-6 + 4e-6),
        counted("oracle", 4, 288.0, 9.0, 2.1e-3 + 576e-6 + 4e-6 + 3e-3),
    ]
    engine = [{"scope": "layer", "replayed": True} for _ in cases]
    contexts = [
        {"context": 100.0, "step_s": {"median": 1e-3}},
        {"context": 1100.0, "step_s": {"median": 1.01e-3}},
    ]
    found = find_contrasts({"engine": engine, "contexts": contexts}, cases)
    parts = found.parts(cases[-1])
    expected = {"experts": 576e-6, "attention": 4e-6, "fixed": 2.1e-3, "copy": 3e-3}
    assert parts == pytest.approx(expected)
    # One request always demands as many experts: there the slope of four stands.
    assert found.parts(cases[0])["copy"] == pytest.approx(0.0, abs=1e-9)
    assert find_contrasts({"engine": engine}, cases).parts(cases[-1]) == {}


def test_a_datasheet_bounds_from_below(measured):
    results = copy.deepcopy(measured)
    results["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    row = ladder(results, HARDWARE, simulate=False)[1]
    record = results["engine"][1]
    fetched = np.median(record["steps"]["fetched_bytes"])
    assert row["roofline_s"] >= 0.5 * fetched / DATASHEETS["H100"].link_bytes_per_s > 0
    assert row["simulated_s"] is None
