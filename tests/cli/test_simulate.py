import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from moejax import cli
from moejax.cards import load_model
from moejax.trace import save_trace
from moejax.workloads import lru_hit_ratio, oracle_hit_ratio

from ._tiny import NUM_EXPERTS, NUM_LAYERS, TOPK, make_trace

NUM_REQUESTS, TOKENS = 3, 20
NUM_DEMANDS = NUM_REQUESTS * TOKENS * NUM_LAYERS * TOPK

FIELDS = ["strategy", "slots", "scope", "hit_ratio", "hit_ratio_warm", "num_hits", "num_loads"]
FIELDS += ["per_layer_hit_ratio"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    save_trace(make_trace(), folder / "t.safetensors")
    save_trace(make_trace(seed=1), folder / "profile.safetensors")
    phase = (np.arange(NUM_REQUESTS * TOKENS) % TOKENS >= 5).astype(np.uint8)
    save_trace(make_trace(phase=phase), folder / "phase.safetensors")
    holes = make_trace().experts.copy()
    holes[:10] = 255
    save_trace(make_trace(experts=holes), folder / "holes.safetensors")
    return folder


@pytest.fixture
def simulate(folder, capsys, monkeypatch):
    def run(*arguments: str, trace: str = "t") -> tuple[list[dict], str]:
        command = ["simulate", "--trace", str(folder / f"{trace}.safetensors"), *arguments]
        code = cli.main([*command, "-o", "json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out), err

    monkeypatch.chdir(folder)
    return run


def test_a_record_per_strategy_and_slots(simulate):
    records, err = simulate("--strategy", "lru,lfu,oracle", "--slots", "4,8", "--scope", "layer")
    names = ["lru", "lru", "lfu", "lfu", "oracle", "oracle"]
    assert [record["strategy"] for record in records] == names
    assert [record["slots"] for record in records] == [4, 8] * 3
    assert err == ""
    for record in records:
        assert list(record) == FIELDS
        assert record["scope"] == "layer"
        assert record["num_hits"] + record["num_loads"] == NUM_DEMANDS
        assert record["hit_ratio"] == record["num_hits"] / NUM_DEMANDS
        assert record["hit_ratio"] <= record["hit_ratio_warm"] <= 1
        assert len(record["per_layer_hit_ratio"]) == NUM_LAYERS
        assert np.mean(record["per_layer_hit_ratio"]) == pytest.approx(record["hit_ratio"])


def test_counts_agree_with_an_independent_method(simulate):
    """The curves that workloads are fitted with share no code with the simulator."""
    records, _ = simulate("--strategy", "lru,oracle", "--slots", "1,4,15", "--reset-per-request")
    experts = make_trace().experts.reshape(NUM_REQUESTS, TOKENS, NUM_LAYERS, TOPK)
    lru = lru_hit_ratio(experts, NUM_EXPERTS)[[1, 4, 15]]
    oracle = oracle_hit_ratio(experts, NUM_EXPERTS, (1, 4, 15))
    ours = [record["hit_ratio"] for record in records]
    np.testing.assert_allclose(ours, [*lru, *oracle], rtol=1e-12)


def test_the_cache_is_carried_across_requests_unless_told(simulate):
    (carried,), _ = simulate("--strategy", "lru", "--slots", "8")
    (emptied,), _ = simulate("--strategy", "lru", "--slots", "8", "--reset-per-request")
    assert carried["num_hits"] > emptied["num_hits"]


def test_a_batch_fetches_shared_experts_once(simulate):
    (record,), _ = simulate("--strategy", "lru", "--slots", "0", "--batch-size", "3")
    places = make_trace().experts.reshape(NUM_REQUESTS, TOKENS, NUM_LAYERS, TOPK)
    sets = places.transpose(1, 2, 0, 3).reshape(TOKENS, NUM_LAYERS, -1)
    distinct = sum(len(np.unique(row)) for step in sets for row in step)
    assert (record["num_hits"], record["num_loads"]) == (0, distinct)


def test_what_was_not_computed_is_not_counted(simulate):
    (record,), _ = simulate("--strategy", "lru", "--slots", "4", trace="holes")
    assert record["num_hits"] + record["num_loads"] == NUM_DEMANDS - 10 * NUM_LAYERS * TOPK


def test_decode_hits_where_phases_are_marked(simulate):
    (marked,), _ = simulate("--strategy", "lru", "--slots", "8", trace="phase")
    (plain,), _ = simulate("--strategy", "lru", "--slots", "8")
    assert "decode_hit_ratio" not in plain
    assert 0 < marked["decode_hit_ratio"] != marked["hit_ratio"] == plain["hit_ratio"]


def test_hardware_adds_times(simulate):
    (record,), err = simulate("--strategy", "lru", "--slots", "8", "--hardware", "rtx-3090")
    assert {*FIELDS, "step_latency_s", "stall_s", "fetched_bytes"} <= set(record)
    size = load_model("tiny-moe").expert_bytes
    per_step = record["num_loads"] * size / (NUM_REQUESTS * TOKENS)
    assert record["fetched_bytes"] == pytest.approx(per_step)
    assert 0 < record["stall_s"] < record["step_latency_s"]
    assert "simulated with the profile rtx-3090" in err


def test_times_start_afresh_where_counts_do(simulate):
    arguments = ("--strategy", "lru", "--slots", "8", "--hardware", "rtx-3090")
    (carried,), _ = simulate(*arguments)
    (emptied,), _ = simulate(*arguments, "--reset-per-request")
    for record in (carried, emptied):
        assert record["timed_hit_ratio"] == pytest.approx(record["hit_ratio"])
    assert emptied["stall_s"] > carried["stall_s"]


def test_a_capacity_in_bytes_is_as_good_as_slots(simulate):
    size = load_model("tiny-moe").expert_bytes
    (by_slots,), _ = simulate("--strategy", "lru", "--slots", "4")
    (by_bytes,), _ = simulate("--strategy", "lru", "--capacity", f"{4 * NUM_LAYERS * size}B")
    assert by_bytes["capacity_bytes"] == 4 * NUM_LAYERS * size
    assert by_bytes["num_hits"] == by_slots["num_hits"]
    pool = ("--strategy", "lru", "--scope", "pool")
    (by_slots,), _ = simulate(*pool, "--slots", "64")
    (by_bytes,), _ = simulate(*pool, "--capacity", f"{64 * size}B")
    assert by_bytes["num_hits"] == by_slots["num_hits"]
    assert by_bytes["slots"] is None


def test_a_pool_below_its_cycle_never_hits_and_says_so(simulate):
    cycle = (NUM_LAYERS - 1) * TOPK + 1
    (record,), err = simulate("--strategy", "lru", "--scope", "pool", "--slots", str(cycle - 1))
    assert record["num_hits"] == 0
    assert f"below one step's cycle of {cycle}" in err
    (record,), err = simulate("--strategy", "lru", "--scope", "pool", "--slots", "128")
    assert record["num_loads"] == len(
        np.unique(make_trace().experts + 16 * np.arange(8)[None, :, None])
    )
    assert err == ""


def test_learning_uses_the_profile(simulate):
    (record,), _ = simulate(
        "--strategy", "top_k", "--slots", "8", "--profile", "profile.safetensors"
    )
    counts = [
        np.bincount(make_trace(seed=1).experts[:, layer].ravel(), minlength=16)
        for layer in range(8)
    ]
    pinned = [set(np.argsort(-count, kind="stable")[:8]) for count in counts]
    hits = sum(
        expert in pinned[i] for row in make_trace().experts for i in range(8) for expert in row[i]
    )
    first_loads = NUM_LAYERS * 8
    assert hits - first_loads <= record["num_hits"] <= hits


def test_max_steps_cuts_the_trace(simulate):
    (record,), _ = simulate("--strategy", "lru", "--slots", "8", "--max-steps", "7")
    assert record["num_hits"] + record["num_loads"] == 7 * NUM_LAYERS * TOPK


def test_every_format_holds_the_same_numbers(folder, capsys):
    path = str(folder / "t.safetensors")
    command = ["simulate", "--trace", path, "--strategy", "lru", "--slots", "4,8", "-o"]
    printed = {}
    for output in ("json", "jsonl", "csv", "md", "table"):
        assert cli.main([*command, output]) == 0
        printed[output], err = capsys.readouterr()
        assert err == ""
    records = json.loads(printed["json"])
    assert [json.loads(line) for line in printed["jsonl"].splitlines()] == records
    rows = list(csv.DictReader(io.StringIO(printed["csv"])))
    assert [int(row["num_hits"]) for row in rows] == [record["num_hits"] for record in records]
    assert printed["md"].splitlines()[0].startswith("| strategy | slots |")
    for record in records:
        assert f"{100 * record['hit_ratio']:.1f} %" in printed["table"]
        assert f"{100 * record['hit_ratio_warm']:.1f} %" in printed["table"]


def test_flag_before_variable_before_file(folder, tmp_path, monkeypatch, capsys):
    def slots_shown(*arguments: str) -> list[int]:
        command = ["simulate", "--trace", str(folder / "t.safetensors"), *arguments]
        assert cli.main([*command, "--strategy", "lru", "-o", "json"]) == 0
        return [record["slots"] for record in json.loads(capsys.readouterr().out)]

    monkeypatch.chdir(tmp_path)
    assert slots_shown() == [1, 2, 4, 8]
    (tmp_path / "moejax.toml").write_text("[simulate]\nslots = [3, 5]\n")
    assert slots_shown() == [3, 5]
    monkeypatch.setenv("MOEJAX_SIMULATE_SLOTS", "6")
    assert slots_shown() == [6]
    assert slots_shown("--slots", "7") == [7]


def test_a_workload_stands_in_and_is_named(capsys):
    command = "simulate --strategy lru --slots 30 --max-steps 64 -o json"
    assert cli.main(command.split()) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["slots"] == 30
    assert "synthetic routing of the workload 'qwen1.5-moe'" in err


def test_a_model_is_replayed_on_its_own_workload(capsys):
    command = "simulate --model mixtral-8x7b --strategy lru --slots 4 --max-steps 64 -o json"
    assert cli.main(command.split()) == 0
    out, err = capsys.readouterr()
    assert "workload 'mixtral-8x7b'" in err
    record = json.loads(out)[0]
    assert record["num_hits"] + record["num_loads"] == 64 * 32 * 2


def test_a_model_without_a_workload_is_not_replayed_on_another(capsys):
    assert cli.main(["simulate", "--model", "tiny-moe", "--strategy", "lru"]) == 2
    assert "routes 24 layers" in capsys.readouterr().err
