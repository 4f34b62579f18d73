"""The simulator's benchmark: its trace, its plain twin and its record, on a few steps."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_simulator
import simulator_limits
import simulator_peers
import simulator_traces
from simulator_traces import Geometry

SMALL = Geometry(num_layers=2, num_experts=8, num_steps=40, topk=3)


def test_experts_of_an_event_are_distinct_and_seeds_repeat():
    experts = simulator_traces.make_experts(SMALL, 0)
    assert experts.shape == (40, 2, 3)
    assert (np.diff(np.sort(experts, -1), axis=-1) > 0).all()
    np.testing.assert_array_equal(experts, simulator_traces.make_experts(SMALL, 0))
    assert (experts != simulator_traces.make_experts(SMALL, 1)).any()


def test_requests_know_their_next(tmp_path):
    experts = np.array([[[2, 0]], [[1, 2]], [[2, 1]]], np.uint8)
    (path,) = simulator_peers.write_requests(tmp_path, experts)
    requests = np.fromfile(path, simulator_peers.REQUEST)
    assert requests["obj"].tolist() == [3, 1, 2, 3, 3, 2]
    assert requests["next"].tolist() == [3, -1, 5, 4, -1, -1]


def test_numpy_counts_an_example_by_hand():
    profile = simulator_traces.make_profile(SMALL)
    experts = np.array([0, 1, 0, 2, 0, 1], np.uint8)[:, None, None]
    slots = np.array([1, 2, 3])
    counts = {
        name: simulator_peers.numpy_hits(name, experts, profile, 8, slots).tolist()
        for name in ("lru", "lfu", "oracle")
    }
    # One slot: lru always holds the last; lfu and the oracle stay with 0. Two: at the only demand
    # of 2, lfu has 1 and 2 at one use each, and ties go to the lower index.
    assert counts == {"lru": [[0, 2, 3]], "lfu": [[2, 3, 3]], "oracle": [[2, 3, 3]]}


@pytest.fixture(scope="module")
def record():
    options = argparse.Namespace(repeats=1, peer_repeats=1, twin_steps=40)
    return bench_simulator.measure(SMALL, options, has_peer=False)


def test_every_cell_agrees_with_plain_numpy(record):
    assert record["cells"] == 5 * 2 * 8
    assert record["cells_equal"] == record["cells"]


def test_a_wrong_count_is_seen(monkeypatch):
    profile = simulator_traces.make_profile(SMALL)
    experts = simulator_traces.make_experts(SMALL, 0)
    strategies = {"lru": bench_simulator.lru()}
    right = simulator_peers.numpy_hits
    monkeypatch.setattr(
        bench_simulator, "numpy_hits", lambda *a: right(*a) + np.eye(2, 8, dtype=int)
    )
    found = bench_simulator.compare(strategies, profile, experts, SMALL, 40, False)
    assert (found["cells"], found["cells_equal"]) == (16, 14)


def test_without_the_peer_its_fields_are_null(record):
    assert [sweep["num_capacities"] for sweep in record["sweeps"]] == [8, 61]
    for sweep in record["sweeps"]:
        assert sweep["ours_s"] == min(sweep["ours_samples_s"])
        assert sweep["first_call_s"] > 0
        for name in ("one_core", "two_processes"):
            assert sweep[f"libcachesim_{name}_s"] is None
            assert sweep[f"ratio_{name}"] is None
    assert record["peak_rss_bytes"] > 1e6
    assert len(record["lru_all_samples_s"]) == 5


def test_a_ratio_is_of_the_fastest_samples():
    found = bench_simulator.beside(0.5, {"one_core": [3.0, 2.0], "two_processes": [1.0]})
    assert (found["ratio_one_core"], found["ratio_two_processes"]) == (4.0, 2.0)


def test_a_long_trace_renames_experts_and_keeps_them_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(simulator_limits, "_SEGMENT_STEPS", 16)
    simulator_limits.write_long(tmp_path / "experts.npy", SMALL)
    experts = np.load(tmp_path / "experts.npy", mmap_mode="r")
    assert experts.shape == (40, 2, 3)
    assert (np.diff(np.sort(experts, -1), axis=-1) > 0).all()
    assert (experts[:8] != experts[16:24]).any()


def test_growth_and_fill_on_a_few_steps(monkeypatch):
    monkeypatch.setattr(simulator_limits, "LONG", SMALL._replace(num_steps=64))
    monkeypatch.setattr(simulator_limits, "WIDE", SMALL)
    monkeypatch.setattr(simulator_limits, "_ARRAY_BYTES", 2**12)
    monkeypatch.setattr(simulator_limits, "_NUM_WORDS", 2**4)
    growth = simulator_limits.measure_growth(1, 1)
    assert [row["num_requests"] for row in growth["lengths"]] == [96, 192, 384]
    assert len(growth["doubling_ratios"]) == 2
    fill = simulator_limits.measure_fill(3, 1, 1)
    assert fill["num_request_capacities"] == 40 * 3 * 2 * 3 * 8
    assert fill["cells_equal"] == fill["cells"] == 5 * 2 * 2 * 8
    assert min(fill["stages"][f"{stage}_s"] for stage in ("score", "rank", "select")) > 0
    assert min(fill[f"{bound}_bound_s"] for bound in ("memory", "operation")) > 0


def test_operations_of_a_select_are_counted():
    # Two experts: one plane of one word. Hits take 3; the union 1; the plane's not, and, count,
    # comparison, or, choice, and, choice, difference, choice; the rest's comparison, or, choice.
    assert simulator_limits.operations_of(2) == 17
