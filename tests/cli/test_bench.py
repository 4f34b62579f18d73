import json
from pathlib import Path

import pytest

import moejax
from moejax import cli
from moejax.bench import GridSettings, open_requests, run_grid
from moejax.bench import learn as learn_requests
from moejax.cards import load_hardware, load_model
from moejax.trace import load_trace, save_trace

from ._tiny import NUM_EXPERTS, NUM_LAYERS, make_trace

STUDY = ("on_demand", "oracle", "multi_look", "top_k", "intelligent")
BATCH_SIZES, NUM_RUNS = (1, 2), 2
RECORD_FIELDS = {
    *("strategy", "batch_size", "run", "dispatch", "slots", "capacity_bytes", "num_late"),
    *("latency_s", "hit_ratio", "late_ratio", "fetched_bytes", "wasted_bytes", "stall_s"),
    *("compute_s", "transfer_s", "memory_bytes"),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "t.safetensors"
    save_trace(make_trace(num_requests=8, tokens_per_request=30), path)
    return path


@pytest.fixture(scope="module")
def run_folder(trace) -> Path:
    """The study's five strategies on the tiny model, through the real program."""
    folder = trace.parent / "new" / "run"
    command = (
        f"bench --trace {trace} --no-measure --quick --batch-sizes 1,2 --runs 2 --out {folder}"
    )
    assert cli.main(command.split()) == 0
    return folder


@pytest.fixture(scope="module")
def results(run_folder) -> dict:
    return json.loads((run_folder / "results.json").read_text())


def test_every_point_has_one_record(results):
    points = [(r["strategy"], r["batch_size"], r["run"], r["dispatch"]) for r in results["grid"]]
    assert points == [
        (name, size, run, "batched")
        for name in STUDY
        for size in BATCH_SIZES
        for run in range(NUM_RUNS)
    ]


def test_the_documented_fields_are_there(results):
    documented = ("schema", "environment", "model", "hardware", "trace", "grid", "measured")
    assert set(documented) <= set(results)
    assert results["schema"] == "moejax.bench/1"
    for record in results["grid"]:
        assert set(record) >= RECORD_FIELDS
        assert set(record["latency_s"]) == {"mean", "std", "p50", "p95", "p99"}
    assert {"device", "versions", "commit", "argv", "seed"} <= set(results["environment"])
    assert results["environment"]["seed"] == 0
    assert results["environment"]["versions"]["moejax"] == moejax.__version__
    assert results["measured"] == {"transfer": [], "compute": []}


def test_where_the_numbers_come_from_is_told(results, trace):
    assert results["model"]["name"] == "tiny-moe"
    assert results["hardware"]["name"] == "rtx-3090"
    assert results["trace"]["sha256"] == load_trace(trace).sha256
    assert results["trace"]["licence"] == "CC0-1.0"
    assert results["trace"]["workload"] is None


def test_all_strategies_have_half_of_the_experts(results):
    model = load_model("tiny-moe")
    capacity_bytes = NUM_LAYERS * NUM_EXPERTS // 2 * model.expert_bytes
    assert {record["slots"] for record in results["grid"]} == {NUM_EXPERTS // 2}
    assert {record["capacity_bytes"] for record in results["grid"]} == {capacity_bytes}


def test_numbers_hang_together(results):
    for record in results["grid"]:
        latency_s = record["latency_s"]
        assert latency_s["p50"] <= latency_s["p95"] <= latency_s["p99"]
        assert latency_s["mean"] == pytest.approx(record["compute_s"] + record["stall_s"])
        assert 0 <= record["wasted_bytes"] <= record["fetched_bytes"]
        assert record["hit_ratio"] + record["late_ratio"] <= 1
        expected = 0 if record["strategy"] == "on_demand" else pytest.approx(0.5, abs=0.5)
        assert record["hit_ratio"] == expected
    mean_s = dict.fromkeys(STUDY, 0.0)
    for record in results["grid"]:
        mean_s[record["strategy"]] += record["latency_s"]["mean"]
    assert min(mean_s, key=mean_s.__getitem__) == "oracle"
    assert max(mean_s, key=mean_s.__getitem__) == "on_demand"


def test_numbers_are_those_of_the_library(results, trace):
    model, hardware = load_model("tiny-moe"), load_hardware("rtx-3090")
    settings = GridSettings(
        strategies=("on_demand",),
        batch_sizes=BATCH_SIZES,
        num_runs=NUM_RUNS,
        slots=(NUM_EXPERTS // 2,) * NUM_LAYERS,
        num_steps=results["settings"]["num_steps"],
    )
    requests = open_requests(load_trace(trace), "unused", model, 0)
    grid = run_grid(settings, model, hardware, requests, learn_requests(requests))
    assert grid == results["grid"][: len(grid)]


def test_a_plan_for_the_same_bytes_lies_beside_the_results(run_folder, results):
    plan = json.loads((run_folder / "plan.json").read_text())
    assert plan["budget_bytes"] == results["grid"][0]["capacity_bytes"]
    assert plan["model"] == "tiny-moe"


def test_nothing_else_is_written(run_folder):
    assert sorted(path.name for path in run_folder.iterdir()) == ["plan.json", "results.json"]


def bench(trace: Path, *arguments: str) -> int:
    """Seconds, not minutes; with `--slots 0` there are no tiers to tune either."""
    fixed = ["--no-measure", "--quick", "--strategies", "on_demand", "--runs", "1"]
    return cli.main(["bench", "--trace", str(trace), *fixed, *arguments])


def test_stdout_is_data_and_the_rest_is_told(trace, tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        bench(trace, "--batch-sizes", "1", "--slots", "0", "--out", str(folder), "-o", "json") == 0
    )
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    record = json.loads((folder / "results.json").read_text())["grid"][0]
    assert row["strategy"] == "on_demand"
    assert row["latency_s"] == record["latency_s"]["mean"]
    assert row["fetched_bytes"] == record["fetched_bytes"]
    assert f"wrote {folder / 'results.json'} (1 points)" in err
    assert f"moejax report {folder}" in err
    assert "simulated with the profile rtx-3090" in err


def test_a_recording_too_short_for_a_batch_is_told(trace, tmp_path, capsys):
    warning = "larger batches decode copies of a request"
    for size, is_told in (("2", False), ("16", True)):
        assert bench(trace, "--batch-sizes", size, "--slots", "0", "--out", str(tmp_path)) == 0
        assert (warning in capsys.readouterr().err) == is_told


def test_a_model_that_is_named_comes_before_the_trace_s_own(trace, tmp_path, capsys):
    assert bench(trace, "--model", "qwen1.5-moe-a2.7b", "--out", str(tmp_path)) == 4
    assert "but qwen1.5-moe-a2.7b has 24 layers" in capsys.readouterr().err


def test_both_dispatches_and_a_budget(trace, tmp_path):
    budget_bytes = 5 * NUM_LAYERS * load_model("tiny-moe").expert_bytes
    arguments = ("--batch-sizes", "2", "--dispatch", "both", "--budget", f"{budget_bytes}B")
    assert bench(trace, *arguments, "--out", str(tmp_path / "run")) == 0
    batched, sequential = json.loads((tmp_path / "run" / "results.json").read_text())["grid"]
    assert (batched["dispatch"], sequential["dispatch"]) == ("batched", "sequential")
    assert batched["slots"] == sequential["slots"] == 5
    # Together the two requests share some experts and every other byte.
    assert batched["fetched_bytes"] < sequential["fetched_bytes"]
    assert batched["latency_s"]["mean"] < sequential["latency_s"]["mean"]


def test_a_seed_gives_the_same_numbers_again(trace, tmp_path):
    grids = []
    for name, seed in [("a", "3"), ("b", "3"), ("c", "5")]:
        arguments = ("--batch-sizes", "2", "--seed", seed, "--slots", "0")
        assert bench(trace, *arguments, "--out", str(tmp_path / name)) == 0
        grids.append(json.loads((tmp_path / name / "results.json").read_text())["grid"])
    assert grids[0] == grids[1]
    assert grids[0][0]["fetched_bytes"] != grids[2][0]["fetched_bytes"]


def test_without_out_a_new_folder_under_reports(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(trace, "--batch-sizes", "1", "--slots", "0") == 0
    (path,) = tmp_path.glob("reports/*/results.json")
    assert json.loads(path.read_text())["trace"]["sha256"] == load_trace(trace).sha256


def test_flag_before_variable_before_file(trace, tmp_path, monkeypatch):
    def batch_sizes(*arguments: str) -> set[int]:
        assert bench(trace, *arguments, "--slots", "0", "--out", "run") == 0
        grid = json.loads((tmp_path / "run" / "results.json").read_text())["grid"]
        return {record["batch_size"] for record in grid}

    monkeypatch.chdir(tmp_path)
    (tmp_path / "moejax.toml").write_text("[bench]\nbatch-sizes = [2, 3]\n")
    assert batch_sizes() == {2, 3}
    monkeypatch.setenv("MOEJAX_BATCH_SIZES", "1,3")
    assert batch_sizes() == {1, 3}
    assert batch_sizes("--batch-sizes", "2") == {2}


def test_an_audit_is_asked_for(tmp_path, trace, monkeypatch):
    asked = []

    def recorded(results, model, hardware, **options):
        asked.append((len(results["grid"]), model.name, options["num_runs"], options["seed"]))
        return {"study": {"grid": []}, "audit": [{"claim": "hardware"}]}

    monkeypatch.setattr("moejax.bench._run.run_audit", recorded)
    command = (
        f"bench --trace {trace} --no-measure --quick --strategies lru --batch-sizes 1 --runs 2 "
        f"--seed 4 --out {tmp_path}"
    )
    assert cli.main([*command.split(), "--audit"]) == 0
    assert asked == [(2, "tiny-moe", 2, 4)]
    assert json.loads((tmp_path / "results.json").read_text())["audit"] == [{"claim": "hardware"}]


def test_everything_is_an_audit_and_more(tmp_path, trace, monkeypatch):
    asked = []

    def further(settings, model, hardware, requests, profile, **options):
        asked.append((settings.strategies, model.name, hardware.name, settings.num_runs))
        return {"capacities": {"cells": []}}

    monkeypatch.setattr("moejax.bench._run.run_audit", lambda *_, **__: {"audit": []})
    monkeypatch.setattr("moejax.bench._run.run_further", further)
    command = (
        f"bench --trace {trace} --no-measure --quick --strategies on_demand --batch-sizes 1 "
        f"--runs 2 --out {tmp_path} --full"
    )
    assert cli.main(command.split()) == 0
    assert asked == [(("on_demand", "lru"), "tiny-moe", "rtx-3090", 2)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["audit"] == []
    assert results["capacities"] == {"cells": []}


@pytest.mark.parametrize("option", ["--audit", "--full"])
def test_an_engine_is_not_audited(option, capsys):
    assert cli.main(["bench", "--engine", option]) == 2
    assert f"{option} has no meaning for a real engine" in capsys.readouterr().err
