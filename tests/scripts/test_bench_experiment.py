"""The experiment's benchmark: what a process prints, and what is made of several."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_experiment

from moejax.cli.bench import _BATCH_SIZES, _NUM_RUNS, _NUM_STEPS, _STUDY


def test_it_is_the_experiment_of_the_command():
    assert ",".join(bench_experiment.STRATEGIES) == _STUDY
    assert ",".join(map(str, bench_experiment.BATCH_SIZES)) == _BATCH_SIZES
    assert (bench_experiment.NUM_RUNS, bench_experiment.NUM_STEPS) == (_NUM_RUNS, _NUM_STEPS)


def made_up(experiment_s: float, sha256: str = "a") -> dict:
    return {
        "load_before": 0.5,
        "process_s": experiment_s + 2,
        "num_points": 250,
        "records_sha256": sha256,
        "experiment_s": experiment_s,
        "parts_s": {"requests": 0.25, "oracle, batched": experiment_s - 0.25},
    }


def test_a_summary_is_of_the_warm_processes(monkeypatch):
    processes = iter([made_up(20.0), made_up(5.0), made_up(9.0), made_up(6.0)])
    monkeypatch.setattr(bench_experiment, "run_process", lambda *_: next(processes))
    found = bench_experiment.measure(3, num_runs=10, num_steps=128)
    assert found["cold"]["experiment_s"] == 20.0
    assert found["warm"]["experiment_s"] == {"median": 6.0, "min": 5.0, "max": 9.0}
    assert found["warm"]["parts_s.oracle, batched"]["median"] == 5.75
    assert found["records_equal"]
    assert found["num_points"] == 250


def test_another_record_in_one_process_is_seen(monkeypatch, capsys):
    processes = iter([made_up(20.0), made_up(5.0), made_up(5.0, "b")])
    monkeypatch.setattr(bench_experiment, "run_process", lambda *_: next(processes))
    found = bench_experiment.measure(2, num_runs=10, num_steps=128)
    assert not found["records_equal"]
    bench_experiment.print_plain(found)
    assert "NOT the same" in capsys.readouterr().out


def test_no_warm_sample_is_refused():
    with pytest.raises(SystemExit):
        bench_experiment.main(["--samples", "0"])


def test_one_process_runs_every_point_and_says_its_parts(monkeypatch, capsys):
    monkeypatch.setattr(bench_experiment, "STRATEGIES", ("on_demand",))
    monkeypatch.setattr(bench_experiment, "BATCH_SIZES", (1,))
    bench_experiment.main(["--once", "--runs", "1", "--steps", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["num_points"] == 1
    assert list(found["parts_s"]) == ["requests", "on_demand, batched"]
    assert sum(found["parts_s"].values()) <= found["experiment_s"]
    assert len(found["records_sha256"]) == 64
