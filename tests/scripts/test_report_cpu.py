"""The report on the engine on a CPU."""

import copy
import sys
from pathlib import Path

import pytest

from moejax.results import read_json, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import report_cpu

COMMITTED = report_cpu.FOLDER


@pytest.fixture(scope="module")
def committed() -> dict:
    return read_json(COMMITTED / "results.json")


def test_the_committed_report_is_what_its_results_say(committed):
    page = (COMMITTED / "report.md").read_text(encoding="utf-8")
    assert page == report_cpu.page(committed)


def test_the_report_holds_the_grid_that_was_asked_for(committed):
    held_out = [row for row in committed["ladder"] if row["is_held_out"]]
    found = {(row["strategy"], row["slots"], row["batch_size"]) for row in held_out}
    assert {row["strategy"] for row in held_out} == set(report_cpu.STRATEGIES.split(","))
    assert {str(row["batch_size"]) for row in held_out} == set(report_cpu.BATCH_SIZES.split(","))
    assert len(found) == len(held_out) == 8 * 4 * 3
    assert all(row["counts_equal"] and row["roofline_s"] is None for row in held_out)


def test_scatter_is_that_of_the_samples(committed):
    results = copy.deepcopy(committed)
    results["engine"] = results["engine"][:3]
    for row, misses, spread_s in zip(
        results["engine"], ([1, 1], [2, 2], [0, 5]), (0.1, 0.3, 0.9), strict=True
    ):
        row["steps"] = {"hits": [3, 3], "late": [0, 0], "misses": misses}
        row["step_s"] = {"samples": [1 - spread_s, 1 + spread_s]}
    found = report_cpu.scatter(results)
    assert found["num_steady"] == 2
    assert found["spread_ratio"] == pytest.approx(0.2)
    assert found["worst_spread_ratio"] == pytest.approx(0.3)


def test_a_run_without_a_ladder_is_refused(committed, tmp_path, capsys):
    write_json(tmp_path / "results.json", {**committed, "ladder": []})
    assert report_cpu.main(["--out", str(tmp_path)]) == 4
    assert "holds no ladder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_measurement_that_fails_writes_no_page(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(report_cpu, "moejax", lambda words: asked.append(words[0]) or 5)
    assert report_cpu.main(["--measure", "--out", str(tmp_path)]) == 5
    assert asked == ["bench"]
    assert list(tmp_path.iterdir()) == []
