"""Predicted beside measured on this machine: bench --engine --ladder, validate --against, fit."""

import json
from pathlib import Path

import pytest

from moejax import cli
from moejax.bench import EngineBench
from moejax.cards import load_hardware

ASKED = ("--engine", "--ladder", "--strategies", "lru", "--batch-sizes", "1", "--slots", "4,12")
COPIES = [
    {"kind": "transfer", "memory": "host", "num_bytes": size, "samples_s": [1e-6 + size / 1e10]}
    for size in (1e4, 1e5, 1e6, 1e7)
]


def bench(*words: str) -> int:
    return cli.main(["bench", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of tiny-moe, copies of the machine made up, which take long to measure."""
    out = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        measured = {"transfer": COPIES, "compute": []}
        patch.setattr("moejax.bench.measure_machine", lambda **_: dict(measured))
        assert bench(*ASKED, "--num-steps", "8", "--out", str(out)) == 0
    return out


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_some_cases_are_marked_for_the_fit_and_all_count_what_the_simulator_does(folder):
    results = read(folder)
    rows = results["engine"]
    assert [row["slots"] for row in rows if not row["fit"]] == [4, 12]
    assert sum(row["fit"] for row in rows) == 5
    assert all(row["simulator_counts_equal"] for row in rows)
    assert not results["model"]["has_random_weights"]
    assert len(results["contexts"]) == 2


def test_held_out_cases_are_predicted_and_simulated(folder, capsys):
    assert cli.main(["validate", "--against", str(folder), "-o", "json"]) == 0
    printed, said = capsys.readouterr()
    held_out = [row for row in json.loads(printed) if row["is_held_out"]]
    assert "2 cases that the fit did not see" in said
    for row in held_out:
        low_s, high_s = row["interval_s"]
        assert low_s < row["predicted_s"] < high_s
        assert row["simulated_s"] > 0
        assert row["counts_equal"] is True


def test_fit_sees_the_steps_as_the_run_did(folder, tmp_path):
    out = tmp_path / "mine.toml"
    assert cli.main(["fit", str(folder), "--out", str(out)]) == 0
    mine, theirs = load_hardware(out), load_hardware(folder / "this-machine.toml")
    assert mine.name == "mine"
    assert mine.constants == theirs.constants
    assert mine.constants["copy_latency_s"].source == "fitted to 5 cases of the engine"


def test_the_same_command_again_goes_on(folder, monkeypatch, capsys):
    rows = read(folder)["engine"]
    results = read(folder) | {"engine": [rows[0], *rows[2:]]}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    measured = []

    def measure(self, case, **_):
        measured.append(case.routing)
        return dict(rows[1])

    monkeypatch.setattr(EngineBench, "measure", measure)
    assert bench(*ASKED, "--num-steps", "8", "--out", str(folder)) == 0
    assert "6 cases are there already" in capsys.readouterr().err
    assert measured == [rows[1]["routing"]]
    assert read(folder)["engine"] == rows


def test_a_folder_of_another_run_is_left_alone(folder, capsys):
    before = read(folder)
    assert bench(*ASKED, "--num-steps", "9", "--out", str(folder)) == 2
    assert "is of another run" in capsys.readouterr().err
    assert read(folder) == before


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        ("--ladder", 2, "--ladder has no meaning in a simulation"),
        ("--engine --ladder --replay tiny-moe", 2, "--replay has no meaning for a ladder"),
        ("--engine --ladder --no-check", 2, "--check has no meaning for a ladder"),
        ("--engine --ladder --slots 17", 2, "--slots 17 exceeds the 16 experts"),
        ("--engine --ladder --strategies best", 2, "best"),
    ],
)
def test_what_does_not_go_together_is_refused(words, code, cause, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench(*words.split()) == code
    told = capsys.readouterr().err
    assert cause in told
    assert "hint: " in told
    assert list(tmp_path.iterdir()) == []
