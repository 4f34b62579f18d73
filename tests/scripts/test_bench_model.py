"""The model benchmark in miniature: what it counts, what it keeps, what it survives."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.qwen_moe import EXPERTS, QwenMoeConfig, choose_experts, write_config
from moejax.results import Measurement, read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_model
import model_timing

CONFIG = QwenMoeConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=24,
    norm_topk_prob=False,
)
EXPERT_SIZE = 3 * 16 * 12
LAYER_SIZE = (
    (16 * 16 + 16)  # q
    + 2 * (16 * 8 + 8)  # k, v
    + 16 * 16  # o
    + 2 * 16  # norms
    + 6 * 16  # router
    + 3 * 16 * 24  # shared expert
    + 16  # its gate
)
HEAD_SIZE = 48 * 16
CEILINGS = {"bytes_per_s": 1e9, "flops_per_s": 1e12}


@pytest.fixture(scope="module", autouse=True)
def fast_keys():
    """Random numbers of the kind that compiles fastest: every shape is a program."""
    with jax.default_prng_impl("unsafe_rbg"):
        yield


@pytest.fixture(scope="module")
def model():
    return model_timing.draw_weights(CONFIG, jnp.dtype("bfloat16"))


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(write_config(CONFIG)))
    return path


def write_baseline(folder: Path, lines: list[dict], code: int) -> Path:
    """An interpreter that answers like the baseline script, whatever it is asked to run."""
    path = folder / "python"
    printed = "\n".join(f"echo '{json.dumps(line)}'" for line in lines)
    path.write_text(f"#!/bin/sh\n{printed}\necho no torch here >&2\nexit {code}\n")
    path.chmod(0o755)
    return path


def test_every_part_is_measured_and_kept(tmp_path, config_path, capsys):
    lines = [
        {"kind": "environment", "torch": "0"},
        {"kind": "decode", "batch_size": 1, "experts": "eager", "samples_s": [0.5, 0.25]},
    ]
    out = tmp_path / "out" / "results.json"
    words = (
        f"--model {config_path} --layers 1 --dtype float32 --batch-sizes 1,3 --prefill 9 "
        f"--experts scan --sweep-tokens 1 --window 2 --num-windows 2 -o json --out {out} "
        f"--baseline-python {write_baseline(tmp_path, lines, code=1)} --max-seconds 1000 "
        "--parts decode,baseline,prefill,experts"
    )
    assert bench_model.main(words.split()) == 0
    results = read_json(out)
    assert json.loads(capsys.readouterr().out) == results
    assert results["schema"] == "moejax.bench-model/1"
    assert results["config"]["num_hidden_layers"] == 1
    assert results["ceilings"]["bytes_per_s"] > 1e7

    assert [(row["batch_size"], row["experts"]) for row in results["decode"]] == [
        (1, "scan"),
        (3, "scan"),
    ]
    for row in results["decode"]:
        assert len(row["pipelined"]["samples"]) == 2
        assert len(row["blocked"]["samples"]) == len(row["dispatch"]["samples"]) == 4
        assert min(row["pipelined"]["samples"]) > row["bound_s"] > 0
        assert 2 <= row["num_distinct_experts"] <= min(6, 2 * row["batch_size"])
        assert row["num_kernels"] > 5
    (prompt,) = results["prefill"]
    assert prompt["tokens_per_s"] == pytest.approx(9 / np.median(prompt["prefill"]["samples"]))
    assert {row["implementation"] for row in results["experts"]} == set(EXPERTS)
    assert all(min(row["layer"]["samples"]) > 0 for row in results["experts"])
    # What the baseline said before it failed is kept beside why it failed.
    (baseline,) = results["baseline"]
    assert baseline["error"] == "no torch here"
    assert baseline["rows"][1]["decode"]["samples"] == [0.5, 0.25]


def test_nothing_starts_after_the_time_is_up(tmp_path, config_path, model, capsys, monkeypatch):
    monkeypatch.setattr(bench_model, "measure_ceilings", lambda dtype: CEILINGS)
    monkeypatch.setattr(bench_model, "draw_weights", lambda config, dtype: model)
    out = tmp_path / "results.json"
    words = f"--model {config_path} --max-seconds 0 --parts decode,prefill,experts --out {out}"
    assert bench_model.main(words.split()) == 0
    assert not {"decode", "prefill", "experts"} & set(read_json(out))
    assert "not started" in capsys.readouterr().err


def test_what_would_end_too_late_is_not_started(capsys):
    """The first case takes 60 of 100 s, so neither part has time for another of its kind."""
    run = bench_model.Run({}, None, max_seconds=100)

    def measure():
        run.started -= 60
        return {"ok": True}

    assert run.attempt("decode", {"batch_size": 1}, measure) == {"ok": True}
    assert run.attempt("decode", {"batch_size": 2}, measure) == {}
    assert run.attempt("prefill", {"num_tokens": 9}, measure) == {}
    assert run.results["decode"] == [{"batch_size": 1, "ok": True}]
    assert "prefill" not in run.results
    assert capsys.readouterr().err.count("not started") == 2


def test_what_can_end_in_time_is_started():
    run = bench_model.Run({}, None, max_seconds=100)

    def measure():
        run.started -= 40
        return {"ok": True}

    for batch_size in (1, 2, 3):
        run.attempt("decode", {"batch_size": batch_size}, measure)
    assert [row["batch_size"] for row in run.results["decode"]] == [1, 2]


def test_a_case_that_fails_costs_only_itself(tmp_path):
    run = bench_model.Run({}, tmp_path / "results.json", max_seconds=1000)

    def fail():
        raise MemoryError("out of memory\nand more")

    run.attempt("decode", {"batch_size": 1}, fail)
    run.attempt("decode", {"batch_size": 2}, lambda: {"ok": True})
    assert read_json(run.out)["decode"] == [
        {"batch_size": 1, "error": "out of memory"},
        {"batch_size": 2, "ok": True},
    ]


def test_a_model_that_is_not_there_is_an_error(capsys):
    assert bench_model.main(["--model", "nowhere/config.json"]) == 4
    assert "error: nowhere" in capsys.readouterr().err


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--parts", "decode,prefil"])
    assert "'prefil'" in capsys.readouterr().err


def test_bytes_of_a_model(model):
    assert model.expert_bytes() == 2 * 2 * 6 * EXPERT_SIZE
    assert model.dense_bytes() == 2 * (2 * LAYER_SIZE + 16 + HEAD_SIZE)
    assert len(model.routed_experts("gate_up_proj")) == 2
    assert all(array.dtype == jnp.bfloat16 for array in model.weights)
    norms = [w for name, w in zip(model.names, model.weights, strict=True) if "norm" in name]
    assert len(norms) == 5
    assert all(bool((norm == 1).all()) for norm in norms)


def test_bound_of_a_step(model):
    row = model_timing.time_decode(model, CEILINGS, 2, "scan", window=3, num_windows=1)
    num_bytes = model.dense_bytes() + row["num_distinct_experts"] * 2 * EXPERT_SIZE * 2
    # Keys and values of two layers with one head of 8, at 97 to 99 places of two requests.
    num_bytes += 2 * 98 * (2 * 2 * 8) * 2
    assert row["num_bytes"] == pytest.approx(num_bytes)
    assert row["bound_s"] == pytest.approx(num_bytes / 1e9)


def test_bound_of_a_prompt(model):
    row = model_timing.time_prefill(model, CEILINGS, 5, "scan", "xla")
    active = 2 * (LAYER_SIZE + 2 * EXPERT_SIZE) + 16
    pairs = 5 * 6 / 2
    assert row["num_flops"] == 2 * (5 * active + HEAD_SIZE) + 2 * 2 * (2 * 2 * 8) * pairs
    assert row["num_bytes"] == model.dense_bytes() + model.expert_bytes()


def test_the_fastest_is_that_of_the_medians():
    def row(num_tokens, implementation, *samples):
        layer = Measurement("layer", "s", samples)
        return {"num_tokens": num_tokens, "implementation": implementation, "layer": layer}

    rows = [
        row(4, "scan", 3.0, 3.0, 3.0),
        row(4, "gather", 1.0, 2.0, 9.0),
        row(1, "scan", 1.0),
        {"num_tokens": 4, "implementation": "ragged", "error": "out of memory"},
    ]
    assert bench_model.fastest(rows) == {1: "scan", 4: "gather"}


def test_auto_is_the_packages_choice():
    assert bench_model.named("auto", 1) == choose_experts(1, jax.default_backend())
    assert bench_model.named("dense", 1) == "dense"


def test_the_baseline_runs(config_path):
    """Where transformers is installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    options = bench_model.read_options(
        ["--batch-sizes", "1", "--prefill", "6", "--window", "2", "--model", str(config_path)]
    )
    run = bench_model.Run({"config": write_config(CONFIG) | {"dtype": "float32"}}, None, 100.0)
    found = bench_model.time_baseline(run, options)
    assert "error" not in found
    about, *rows = found["rows"]
    assert about["transformers"]
    assert [(row["kind"], row["experts"]) for row in rows] == [
        ("decode", "batched_mm"),
        ("prefill", "grouped_mm"),
        ("decode", "grouped_mm"),
        ("decode", "eager"),
    ]
    assert all(row[row["kind"]].median > 0 for row in rows)
