"""The part of the engine's measurements that no fit sees."""

import sys
from pathlib import Path

import pytest

from moejax.errors import BadFileError
from moejax.results import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_engine


def test_the_ladder_is_measured_on_routing_of_its_own_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "LADDER_STEPS", {1: 3})
    monkeypatch.setattr(bench_engine, "LADDER_WARMUP_STEPS", 1)
    out = tmp_path / "results.json"
    asked = ["--model", "tiny-moe", "--kernels", "xla", "--parts", "ladder", "--out", str(out)]
    monkeypatch.setattr(bench_engine, "LADDER_SHARES", (0.5, 0.13))
    assert bench_engine.main([*asked, "--strategies", "lru"]) == 0
    first = read_json(out)["engine"]
    assert [row["slots"] for row in first] == [8, 2]
    for row in first:
        assert (row["strategy"], row["fit"], row["simulator_counts_equal"]) == ("lru", False, True)
        assert row["recipe"]["source"] == "tiny-moe"
        assert row["recipe"]["seed"] == bench_engine.LADDER_SEED != bench_engine.SEED
        assert len(row["step_s"]["samples"]) == 3
        # Both ran in the room for the larger number of slots.
        assert row["device_bytes"]["slots"] == first[0]["device_bytes"]["slots"]
    assert first[0]["misses_per_step"] < first[1]["misses_per_step"]
    capsys.readouterr()
    assert bench_engine.main([*asked, "--strategies", "lru"]) == 0
    assert read_json(out)["engine"] == first


def test_a_model_without_routing_has_no_ladder():
    with pytest.raises(BadFileError, match="no workload is of a-model"):
        bench_engine.ladder_recipe("a-model", 8)
