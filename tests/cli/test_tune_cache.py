import csv
import io
import json
from pathlib import Path

import pytest

from moejax import cli
from moejax.cards import load_hardware, load_model, models_dir
from moejax.trace import load_trace, save_trace

from ._tiny import NUM_LAYERS, make_trace

FIELDS = {
    *("budget_bytes", "used_bytes", "model", "hardware", "strategy", "tiers", "step_latency_s"),
    *("hit_ratio", "fetched_bytes", "uniform_step_latency_s", "optimum_gap_ratio"),
    *("marginal_s_per_100mb", "warnings"),
}
EXPERT_BYTES = 17_301_504


@pytest.fixture
def tune(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["tune-cache", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "t.safetensors"
    save_trace(make_trace(), path)
    return path


@pytest.mark.parametrize(("budget", "most_slots"), [("0.1GB", 5), ("2GB", 115), ("20GB", 1155)])
def test_a_budget_buys_what_fits_and_no_worse_than_uniform(tune, budget, most_slots):
    code, out, err = tune("--budget", budget, "-o", "json")
    assert code == 0, err
    plan = json.loads(out)
    assert set(plan) >= FIELDS
    assert (plan["model"], plan["hardware"]) == ("qwen1.5-moe-a2.7b", "rtx-3090")
    assert [tier["memory"] for tier in plan["tiers"]] == ["device", "pinned", "pageable"]
    device = plan["tiers"][0]
    assert set(device) == {"name", "memory", "capacity_bytes", "experts_per_layer"}
    assert len(device["experts_per_layer"]) == 24
    assert sum(device["experts_per_layer"]) <= most_slots
    assert device["capacity_bytes"] == sum(device["experts_per_layer"]) * EXPERT_BYTES
    assert device["capacity_bytes"] == plan["used_bytes"] <= plan["budget_bytes"]
    assert plan["step_latency_s"] <= plan["uniform_step_latency_s"]
    assert plan["optimum_gap_ratio"] <= 0.01
    assert plan["marginal_s_per_100mb"] <= 0
    assert plan["workload"] == "qwen1.5-moe"
    assert "predicted with the profile rtx-3090" in err
    assert "routing is synthetic" in err


def test_the_whole_budget_is_used(tune):
    _, out, _ = tune("--budget", "2GB", "-o", "json")
    plan = json.loads(out)
    assert plan["used_bytes"] == 115 * EXPERT_BYTES
    assert plan["hit_ratio"] == pytest.approx(0.21, abs=0.03)


def test_dense_weights_share_the_budget_or_refuse_with_the_smallest(tune):
    code, out, err = tune("--budget", "2GB", "--include-dense")
    assert (code, out) == (3, "")
    smallest_bytes = int(err.split("smallest feasible budget is ")[1].split()[0])
    assert smallest_bytes > load_model("qwen1.5-moe-a2.7b").dense_bytes
    assert tune("--budget", f"{smallest_bytes - 1}B", "--include-dense")[0] == 3
    code, out, _ = tune("--budget", f"{smallest_bytes}B", "--include-dense", "-o", "json")
    assert code == 0
    plan = json.loads(out)
    assert smallest_bytes - EXPERT_BYTES < plan["used_bytes"] <= smallest_bytes


def test_a_recorded_trace_is_tuned_for_its_own_model(tune, trace):
    arguments = ("--budget", "2MB", "--trace", str(trace), "-o", "json")
    code, out, err = tune(*arguments)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["model"] == "tiny-moe"
    assert plan["workload"] is None
    assert plan["trace"] == str(trace)
    assert len(plan["tiers"][0]["experts_per_layer"]) == NUM_LAYERS
    assert "synthetic" not in err
    assert tune(*arguments)[1] == out


def test_another_strategy_is_tuned_on_requests_it_did_not_learn_from(tune, trace):
    code, out, err = tune(
        "--budget", "2MB", "--trace", str(trace), "--strategy", "lfu", "-o", "json"
    )
    assert code == 0, err
    assert json.loads(out)["strategy"] == "lfu"


def test_numbers_are_those_of_the_library(tune, trace):
    from moejax.cli._tuning import make_plan

    _, out, _ = tune("--budget", "2MB", "--trace", str(trace), "--objective", "bytes", "-o", "json")
    plan, _ = make_plan(
        load_trace(trace),
        load_model("tiny-moe"),
        load_hardware("rtx-3090"),
        2_000_000,
        objective="bytes",
    )
    assert json.loads(out).items() >= json.loads(json.dumps(plan.to_json())).items()


def test_the_plan_is_stored(tune, trace, tmp_path):
    path = tmp_path / "plan.json"
    code, out, err = tune(
        "--budget", "2MB", "--trace", str(trace), "--out", str(path), "-o", "json"
    )
    assert code == 0
    assert json.loads(path.read_text()) == json.loads(out)
    assert f"wrote {path}\n" in err


def test_other_formats(tune, trace):
    arguments = ("--budget", "2MB", "--trace", str(trace), "-o")
    plan = json.loads(tune(*arguments, "jsonl")[1])
    (row,) = csv.DictReader(io.StringIO(tune(*arguments, "csv")[1]))
    assert float(row["step_latency_s"]) == plan["step_latency_s"]
    assert json.loads(row["tiers"]) == plan["tiers"]
    assert tune(*arguments, "md")[1].startswith("| field | value |")
    table = tune(*arguments, "table")[1]
    for words in ("tiny-moe, lru, on NVIDIA RTX 3090", "step latency", "used of the budget", "L1"):
        assert words in table


def test_flag_before_variable_before_file(tune, trace, tmp_path, monkeypatch):
    def budget_bytes(*arguments: str) -> int:
        code, out, err = tune("--trace", str(trace), *arguments, "-o", "json")
        assert code == 0, err
        return json.loads(out)["budget_bytes"]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "moejax.toml").write_text("[tune-cache]\nbudget = '1MB'\n")
    assert budget_bytes() == 10**6
    monkeypatch.setenv("MOEJAX_TUNE_CACHE_BUDGET", "1MiB")
    assert budget_bytes() == 2**20
    assert budget_bytes("--budget", "3MB") == 3 * 10**6


def test_a_plan_says_how_sure_it_is(tune):
    """Where layers are alike, nobody can tell a plan from equal slots; lfu loses to lru."""
    profile = models_dir().parent / "reports" / "h100-engine" / "this-machine.toml"
    asked = ["--budget", "2GB", "--hardware", str(profile)]
    code, out, _ = tune(*asked, "-o", "json")
    plan = json.loads(out)
    assert code == 0
    low_s, high_s = plan["latency_interval_s"]
    assert low_s < plan["step_latency_s"] < high_s
    assert plan["beats_uniform_probability"] == plan["beats_lru_probability"]
    assert plan["ties"] == ["uniform", "lru"]
    code, out, _ = tune(*asked, "--strategy", "lfu", "--budget", "4GB")
    assert code == 0
    assert "note: a tie with equal slots" in out
    assert "note: lru with equal slots is faster." in out


def test_a_profile_that_does_not_say_gives_no_chances(tune):
    code, out, err = tune("--budget", "0.1GB", "-o", "json")
    plan = json.loads(out)
    assert code == 0
    assert plan["latency_interval_s"] is None
    assert plan["beats_lru_probability"] is None
    assert plan["ties"] is None
    assert "does not say how sure it is" in err


def test_two_devices_share_the_experts(tune, trace, tmp_path):
    path = tmp_path / "plan.json"
    asked = ("--budget", "2MB", "--trace", str(trace), "--devices", "2")
    code, out, err = tune(*asked, "--out", str(path), "-o", "json")
    assert code == 0, err
    plan = json.loads(out)
    assert json.loads(path.read_text()) == plan
    assert (plan["num_devices"], plan["trace"]) == (2, str(trace))
    assert (plan["batch_size"], plan["context_tokens"]) == (1, 512)
    alone = json.loads(tune(*asked[:-2], "-o", "json")[1])
    assert plan["one_device_step_latency_s"] == alone["step_latency_s"]
    assert plan["step_latency_s"] < alone["step_latency_s"]
    assert plan["hit_ratio"] > alone["hit_ratio"]
    assert plan["step_latency_s"] <= plan["uniform_step_latency_s"] * (1 + 1e-9)
    (device,) = plan["tiers"]
    assert (device["memory"], len(device["experts_per_layer"])) == ("device", NUM_LAYERS)
    assert device["capacity_bytes"] == plan["used_bytes"] <= plan["budget_bytes"] == 2_000_000
    table = tune(*asked)[1]
    for words in (
        "on each of 2 devices",
        "one device with the same budget",
        "2 links and memories",
    ):
        assert words in table
    assert "does not say what an all-reduce takes" in table


def test_one_device_is_what_it_was(tune, trace):
    asked = ("--budget", "2MB", "--trace", str(trace), "-o", "json")
    assert tune(*asked, "--devices", "1")[1] == tune(*asked)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--strategy", "lfu"), 2, "use --strategy lru"),
        (("--objective", "p99"), 2, "Use --objective latency"),
        (("--devices", "17"), 2, "Use 1 to 16 devices"),
        (("--budget", "1kB"), 3, "smallest feasible budget"),
        (("--pinned-budget", "1MB"), 3, "smallest feasible --pinned-budget"),
    ],
)
def test_what_several_devices_cannot_do(tune, trace, arguments, code, words):
    asked = ("--budget", "2MB", "--trace", str(trace), "--devices", "2")
    found, out, err = tune(*asked, *arguments)
    assert (found, out) == (code, "")
    assert words in err
