"""The simulator's benchmark: its trace, its plain twin and its record, on a few steps."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_simulator
from bench_simulator import Geometry

SMALL = Geometry(num_layers=2, num_experts=8, num_steps=40, topk=3)


def test_experts_of_an_event_are_distinct_and_seeds_repeat():
    experts = bench_simulator.make_experts(SMALL, 0)
    assert experts.shape == (40, 2, 3)
    assert (np.diff(np.sort(experts, -1), axis=-1) > 0).all()
    np.testing.assert_array_equal(experts, bench_simulator.make_experts(SMALL, 0))
    assert (experts != bench_simulator.make_experts(SMALL, 1)).any()


def test_requests_know_their_next(tmp_path):
    experts = np.array([[[2, 0]], [[1, 2]], [[2, 1]]], np.uint8)
    (path,) = bench_simulator.write_requests(tmp_path, experts)
    requests = np.fromfile(path, bench_simulator.REQUEST)
    assert requests["obj"].tolist() == [3, 1, 2, 3, 3, 2]
    assert requests["next"].tolist() == [3, -1, 5, 4, -1, -1]


def test_numpy_counts_an_example_by_hand():
    profile = bench_simulator.make_profile(SMALL)
    experts = np.array([0, 1, 0, 2, 0, 1], np.uint8)[:, None, None]
    slots = np.array([1, 2, 3])
    counts = {
        name: bench_simulator.numpy_hits(name, experts, profile, 8, slots).tolist()
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
    profile = bench_simulator.make_profile(SMALL)
    experts = bench_simulator.make_experts(SMALL, 0)
    strategies = {"lru": bench_simulator.lru()}
    right = bench_simulator.numpy_hits
    monkeypatch.setattr(
        bench_simulator, "numpy_hits", lambda *a: right(*a) + np.eye(2, 8, dtype=int)
    )
    found = bench_simulator.compare(strategies, profile, experts, SMALL, 40, False)
    assert (found["cells"], found["cells_equal"]) == (16, 14)


def test_without_the_peer_its_fields_are_null(record):
    for label in ("8", "61"):
        assert len(record[f"ours_s_{label}"]) == 1
        assert record[f"first_call_s_{label}"] > 0
        for name in ("one_core", "two_processes"):
            assert record[f"libcachesim_{name}_s_{label}"] is None
            assert record[f"ratio_{name}_{label}"] is None
    assert record["peak_rss_bytes"] > 1e6
    assert len(record["lru_all_s"]) == 3
