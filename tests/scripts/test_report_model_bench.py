"""The report on the speed of the model: the committed one, and runs that are checked by hand."""

import copy
import json
import sys
from pathlib import Path

import pytest

from moejax.qwen_moe import EXPERTS
from moejax.results import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import model_bench_tables
import report_model_bench

COMMITTED = report_model_bench.FOLDER


def measured(*samples):
    return {"name": "time", "unit": "s", "samples": list(samples)}


def decode(batch_size, experts, *samples):
    return {
        "batch_size": batch_size,
        "experts": experts,
        "num_kernels": 10,
        "pipelined": measured(*samples),
        "blocked": measured(*samples),
        "dispatch": measured(*samples),
        "bound_s": 0.001,
        "bound_ratio": 2.0,
    }


def layer(num_tokens, implementation, *samples):
    row = {"num_tokens": num_tokens, "implementation": implementation, "bound_s": 1e-5}
    return {**row, "layer": measured(*samples)}


@pytest.fixture
def run():
    """A step of batch 1 that takes 2 ms, where transformers takes 12 and 30 ms."""
    theirs = [{"kind": "environment", "transformers": "5", "torch": "2"}]
    theirs += [
        {"kind": "decode", "batch_size": 1, "experts": name, "decode": measured(*samples)}
        for name, samples in (("eager", (0.03,)), ("batched_mm", (0.011, 0.012, 0.02)))
    ]
    return {
        "schema": "moejax.bench-model/1",
        "environment": {
            "device": "a GPU",
            "backend": "gpu",
            "versions": {"jax": "1"},
            "commit": "abc",
            "argv": ["bench_model.py"],
            "date": "2026-01-01T00:00:00+00:00",
        },
        "settings": {"model": "some-model.1b", "sweep_tokens": [1, 2]},
        "config": {"num_hidden_layers": 2, "dtype": "bfloat16"},
        "ceilings": {
            "bytes_per_s": 1e12,
            "flops_per_s": 1e14,
            **{name: measured(0.1) for name in ("read", "copy", "product")},
        },
        "decode": [
            decode(1, "unrolled", 0.001, 0.002, 0.004),
            {"batch_size": 4, "experts": "dense", "error": "out of memory"},
        ],
        "baseline": [{"implementation": "transformers", "rows": theirs}],
        "experts": [layer(1, name, 1e-4, 2e-4, 9e-4) for name in EXPERTS],
    }


def write_run(folder, run):
    path = folder / "bench.json"
    path.write_text(json.dumps(run))
    return str(path)


def test_a_case_compares_with_the_fastest_of_transformers(run):
    (case,) = model_bench_tables.gather([{"name": "one", "note": "", "result": run}])
    assert list(case.theirs) == ["batched_mm", "eager"]
    assert case.is_chosen
    assert case.ratios() == pytest.approx((6.0, 0.011 / 0.004, 20.0))


def test_the_report_says_what_the_run_holds(run, tmp_path):
    out = tmp_path / "report"
    arguments = ["--add", "one", write_run(tmp_path, run), "a remark", "--out", str(out)]
    assert report_model_bench.main(arguments) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "is met in every run: 6.0x; the slowest" in text
    assert "- **Decode, batch 1**: 2.00 ms; transformers 12.0 ms; bound 1.00 ms. 6.0x" in text
    assert "some-model.1b, bfloat16, H100 (one)" in text
    # Two layers of 0.2 ms each, 0.02 ms of which are the bound's.
    assert "experts are 400 us of it and 380 us of the excess of 1.00 ms" in text
    assert "the experts at 2 tokens" in text
    assert "a remark" in text
    assert read_json(out / "results.json")["runs"][0]["result"] == run
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("experts", "steps") for suffix in ("png", "svg")
    }


def test_a_missed_target_is_said(run, tmp_path):
    run["decode"][0]["pipelined"] = measured(0.024)
    out = tmp_path / "report"
    arguments = ["--add", "one", write_run(tmp_path, run), "", "--out", str(out)]
    assert report_model_bench.main(arguments) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "is missed: 0.5x" in text
    assert "**2.0x as slow**" in text


def test_a_run_of_the_same_name_is_replaced(run, tmp_path):
    newer = {**copy.deepcopy(run), "elapsed_s": 1.0}
    runs = report_model_bench.add_run([], "one", Path(write_run(tmp_path, run)), "")
    runs = report_model_bench.add_run(runs, "two", Path(write_run(tmp_path, run)), "")
    runs = report_model_bench.add_run(runs, "one", Path(write_run(tmp_path, newer)), "again")
    assert [(entry["name"], entry["note"]) for entry in runs] == [("one", "again"), ("two", "")]
    assert runs[0]["result"] == newer


def test_a_processor_is_told_by_its_least_sample(run):
    entry = {"name": "one", "note": "", "result": run}
    row = run["experts"][0]
    assert model_bench_tables.layer_s(entry, row) == 2e-4
    run["environment"]["backend"] = "cpu"
    assert model_bench_tables.layer_s(entry, row) == 1e-4


def test_a_poor_choice_is_said(run):
    run["experts"] += [layer(4, "unrolled", 3e-4), layer(4, "dense", 1e-4)]
    text = model_bench_tables.sweep_table({"name": "one", "note": "", "result": run})
    assert "within a tenth of the fastest at 1 of 2 sizes, 3.0x at 4." in text
    assert "| `dense` | `unrolled` | 3.00x |" in text


def test_another_file_is_refused(tmp_path, capsys):
    path = write_run(tmp_path, {"schema": "moejax.run/1"})
    assert report_model_bench.main(["--add", "one", path, "", "--out", str(tmp_path)]) == 4
    assert "is no run of the model" in capsys.readouterr().err


def test_no_run_on_a_gpu_is_an_error(tmp_path, capsys):
    assert report_model_bench.main(["--out", str(tmp_path)]) == 4
    assert "hint: Add a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_committed_report_is_what_its_results_say(tmp_path):
    """The page only: fonts differ from machine to machine."""
    runs = read_json(COMMITTED / "results.json")["runs"]
    text = report_model_bench.page(runs, model_bench_tables.gather(runs))
    assert (COMMITTED / "report.md").read_text(encoding="utf-8") == text


def test_the_committed_results_name_no_folder():
    text = (COMMITTED / "results.json").read_text(encoding="utf-8")
    assert not [word for word in ("/home", "/root", "/tmp", "/work") if word in text]
