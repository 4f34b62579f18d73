"""The report on the engine: goals and tables of results that are checked by hand."""

import copy
import json
import sys
from pathlib import Path

import pytest

from moejax.results import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import engine_baselines
import engine_goals
import report_engine

COMMITTED = report_engine.FOLDER


def record(strategy="lru", **given):
    step_s = given.pop("step_s", 0.002)
    bound_s = given.pop("bound_s", 0.0016)
    row = {
        "strategy": strategy,
        "slots": 8,
        "scope": "layer",
        "batch_size": 1,
        "replayed": True,
        "routing": "100 % hits of 8 slots",
        "hit_ratio": 1.0,
        "misses_per_step": 0.0,
        "late_per_step": 0.0,
        "fetched_bytes_per_step": 0.0,
        "step_s": {"median": step_s, "p95": 1.1 * step_s, "samples": [step_s]},
        "bound_sum_s": bound_s,
        "bound_max_s": bound_s,
        "bound_sum_ratio": step_s / bound_s,
        "bit_identical": None,
        "simulator_counts_equal": True,
    }
    return row | given


def check(strategy="lru", is_same=True):
    return {
        "strategy": strategy,
        "slots": 8,
        "scope": "layer",
        "batch_size": 1,
        "routing": "router",
        "bit_identical": is_same,
        "num_identity_steps": 64,
        "num_identity_misses": 7,
    }


@pytest.fixture
def results():
    """A step of 2 ms without misses and 5.5 ms at 90 % hits, where the host needs 26 ms."""
    missing = {"hit_ratio": 0.9, "misses_per_step": 10.0, "fetched_bytes_per_step": 0.17e9}
    foreseen = {"routing": "foreseeable misses of 8 slots", "hit_ratio": 0.95}
    run = {
        "environment": {"date": "2026-01-01", "commit": "abc", "versions": {"jax": "1"}},
        "ceilings": {"link_bytes_per_s": 5e10, "hbm_bytes_per_s": 3e12, "flops_per_s": 7e14},
        "parts": ["lru"],
    }
    host = {"system": "host-driven", "variant": "side-stream", "script": "host_driven_decode"}
    theirs = {"system": "transformers", "kind": "decode", "script": "transformers_decode"}
    samples = {"p95": 0.03, "samples": [0.02, 0.03]}
    return {
        "schema": "moejax.bench-engine/1",
        "environment": {"device": "a GPU", **run["environment"]},
        "model": {
            "name": "some-moe",
            "dtype": "bfloat16",
            "has_random_weights": True,
            "routed_bytes": 1e9,
            "config": {"num_hidden_layers": 24},
        },
        "sizes": {"expert_bytes": 17e6},
        "runs": [run],
        "engine": [
            record(),
            record(routing="90 % hits of 8 slots", step_s=0.0055, bound_s=0.005, **missing),
            record("lfu", step_s=0.00204),
            record("lru", scope="pool", step_s=0.00208),
            record(step_s=0.0036, misses_per_step=4.8, **foreseen),
            record("oracle", step_s=0.0024, late_per_step=0.1, **foreseen),
        ],
        "baselines": [
            {**host, "batch_size": 1, "hit_ratio": 0.89, "misses_per_step": 11, "step_s": samples}
            | {"step_s": {"median": 0.0264, **samples}},
            {**theirs, "batch_size": 1, "hit_ratio": 1.0, "step_s": {"median": 0.03, **samples}},
        ],
        "failed": [{"part": "prefill", "error": "first line\nlast line"}],
        "checks": [check()],
        "drift": {
            "num_steps": 2000,
            "num_ends": 200,
            "first_s": 0.002,
            "last_s": 0.0021,
            "drift_ratio": 0.05,
        },
    }


def write(path, results):
    path.write_text(json.dumps(results))
    return str(path)


def goal(results, words):
    (found,) = [goal for goal in engine_goals.goals(results) if words in goal.what]
    return found


@pytest.mark.parametrize(
    ("words", "found", "is_met"),
    [
        ("batch 1, 100 % hits", "1.250", True),
        ("batch 1, 90 % hits", "1.100", True),
        ("batch 1, 0 % hits", "", None),
        ("host-driven", "4.80", True),
        ("transformers", "15.00", True),
        ("Other strategies", "1.040 (`lru`, pool)", True),
        ("foreseeable", "1.50", True),
        ("event by event", "6 of 6 cases", True),
        ("Drift", "0.050", False),
    ],
)
def test_goals_are_read_off_the_results(results, words, found, is_met):
    assert (goal(results, words).found, goal(results, words).is_met) == (found, is_met)


def test_one_wrong_case_misses_a_goal(results):
    results["engine"][2]["simulator_counts_equal"] = False
    results["checks"].append(check("lfu", is_same=False))
    assert goal(results, "event by event").found == "5 of 6 cases"
    assert goal(results, "event by event").is_met is False
    assert goal(results, "Tokens and logits").is_met is False


def test_the_report_says_what_the_run_holds(results, tmp_path):
    out = tmp_path / "report"
    path = write(tmp_path / "run.json", results)
    assert report_engine.main(["--take", path, "--out", str(out)]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "- Missed: Drift of the step time over 2,000 steps: 0.050, asked at most 0.02." in text
    assert "| `oracle` | 2.40 ms | 3.60 ms | 1.50x | 0.0 + 0.1 | 4.8 |" in text
    assert "| `lfu` | layer | 2.04 ms | 2.00 ms | +2.0 % |" in text
    assert "- prefill: last line" in text
    assert "not measured" in text
    assert read_json(out / "results.json") == results
    assert {path.name for path in (out / "figures").iterdir()} == {"steps.png", "steps.svg"}


def test_checks_of_another_run_are_noted_in_the_records(results):
    other = copy.deepcopy(results)
    other["model"]["config"]["num_hidden_layers"] = 4
    other["checks"] = [check("lfu", is_same=False)]
    merged = report_engine.with_checks(results, other)
    by_name = {(row["strategy"], row["scope"]): row for row in merged["engine"]}
    assert by_name["lfu", "layer"]["bit_identical"] is False
    assert by_name["lfu", "layer"]["bit_identical_num_layers"] == 4
    assert by_name["lru", "pool"]["bit_identical"] is None
    assert merged["checks"][0]["num_layers"] == 4


def test_runs_that_are_alike_are_joined(results, tmp_path):
    other = copy.deepcopy(results)
    other["engine"] = [record("fifo", step_s=0.0031)]
    paths = [write(tmp_path / f"{i}.json", one) for i, one in enumerate((results, other))]
    out = tmp_path / "report"
    assert report_engine.main(["--take", *paths, "--out", str(out)]) == 0
    found = read_json(out / "results.json")
    assert found["engine"] == [*results["engine"], *other["engine"]]
    assert len(found["runs"]) == found["num_files"] == 2
    assert "These are 2 files joined" in (out / "report.md").read_text(encoding="utf-8")


def test_runs_of_different_models_are_not_joined(results, tmp_path, capsys):
    other = copy.deepcopy(results)
    other["model"]["name"] = "another-moe"
    paths = [write(tmp_path / f"{i}.json", one) for i, one in enumerate((results, other))]
    assert report_engine.main(["--take", *paths, "--out", str(tmp_path / "out")]) == 4
    assert "the runs differ in model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_file_is_refused(tmp_path, capsys):
    path = write(tmp_path / "x.json", {"schema": "moejax.run/1"})
    assert report_engine.main(["--take", path, "--out", str(tmp_path / "out")]) == 4
    assert "is no run of the engine" in capsys.readouterr().err


def test_lines_of_baselines_get_the_names_of_records():
    text = 'noise\n{"kind": "decode", "batch_size": 1, "samples_s": [0.1, 0.3, 0.2]}\n'
    (row,) = engine_baselines.read_lines(text, "transformers_decode")
    assert row["step_s"]["median"] == 0.2
    assert (row["system"], row["hit_ratio"]) == ("transformers", 1.0)
    line = '{"system": "host-driven", "hit_ratio": 0.9, "step_s": {"median": 1.0}}'
    assert engine_baselines.read_lines(line, "host_driven_decode")[0]["hit_ratio"] == 0.9


@pytest.mark.skipif(not (COMMITTED / "results.json").exists(), reason="no run is committed")
def test_the_committed_report_is_what_its_results_say():
    results = read_json(COMMITTED / "results.json")
    page = (COMMITTED / "report.md").read_text(encoding="utf-8")
    assert page == report_engine.page(results)
    text = (COMMITTED / "results.json").read_text(encoding="utf-8")
    assert not [word for word in ("/home", "/root", "/tmp", "/work") if word in text]
