"""`moejax validate --against`, on a few cases of a committed run."""

import json
import shutil
from pathlib import Path

import pytest

from moejax import cli
from moejax.results import read_json

RUN = Path(__file__).resolve().parents[2] / "reports" / "h100-engine"
STRATEGIES = ("lru", "oracle")


@pytest.fixture
def folder(tmp_path) -> Path:
    results = read_json(RUN / "results.json")
    rows = [row for row in results["engine"] if row["strategy"] in STRATEGIES and row["replayed"]]
    # Made again and replayed by the timeline, they would take minutes.
    rows = [{**row, "recipe": None} for row in rows]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**results, "engine": rows, "ladder": [], "ladder_summary": {}}))
    shutil.copy(RUN / "this-machine.toml", tmp_path)
    return tmp_path


@pytest.fixture
def against(capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["validate", "--against", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_rows_are_printed_and_stored_and_held_out_cases_judged(against, folder):
    out = folder / "with-ladder.json"
    code, printed, said = against(folder / "results.json", "--out", out, "-o", "json")
    assert code == 0
    rows = json.loads(printed)
    assert {row["strategy"] for row in rows} == set(STRATEGIES)
    for row in rows:
        low_s, high_s = row["interval_s"]
        assert low_s < row["predicted_s"] < high_s
        assert row["roofline_s"] < row["measured_s"]
    num_held_out = sum(row["is_held_out"] for row in rows)
    assert 0 < num_held_out < len(rows)
    assert f"{num_held_out} cases that the fit did not see" in said
    assert "90 % intervals hold" in said
    stored = read_json(out)
    assert stored["ladder"] == rows
    summary = stored["ladder_summary"]
    assert summary["errors"]["predicted"]["median_ratio"] < 0.05
    for baseline in ("roofline", "two_constants"):
        theirs = summary["errors"][baseline]["median_ratio"]
        assert theirs > 2 * summary["errors"]["predicted"]["median_ratio"]


def test_a_folder_will_do_and_a_profile_without_errors_gives_no_intervals(against, folder):
    code, printed, said = against(folder, "--hardware", "h100", "-o", "json")
    assert code == 0
    assert all(row["interval_s"] is None for row in json.loads(printed))
    assert "does not say how sure it is" in said


def test_counts_that_differ_fail(against, folder):
    results = read_json(folder / "results.json")
    held_out = [row for row in results["engine"] if not row["fit"]]
    held_out[0]["simulator_counts_equal"] = False
    (folder / "results.json").write_text(json.dumps(results))
    code, _, said = against(folder)
    assert code == 1
    assert f"the counts of 1 of {len(held_out)} cases differ" in said


@pytest.mark.parametrize(
    ("content", "code", "problem"),
    [('{"schema": "moejax.run/1"}', 4, "is no run of an engine"), ("[", 4, "")],
)
def test_other_files_are_refused(against, folder, content, code, problem):
    (folder / "results.json").write_text(content)
    found, _, said = against(folder)
    assert found == code
    assert problem in said
    assert "hint:" in said


def test_a_profile_is_needed(against, folder):
    (folder / "this-machine.toml").unlink()
    code, _, said = against(folder)
    assert code == 2
    assert "--hardware" in said


@pytest.mark.parametrize("arguments", [["--out", "a.json"], ["--against", "a.json", "b.toml"]])
def test_options_that_do_not_go_together(arguments, capsys):
    assert cli.main(["validate", *arguments]) == 2
    assert "error:" in capsys.readouterr().err
