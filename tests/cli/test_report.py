import json
import sys
from pathlib import Path

import pytest

from moejax import cli

from ..report._factory import results, without_links, write_run
from ..report._further import full_results


@pytest.fixture
def report(capsys, monkeypatch, tmp_path):
    def run(*arguments: str | Path) -> tuple[int, dict, str]:
        code = cli.main(["report", *map(str, arguments), "-o", "json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out), err

    monkeypatch.chdir(tmp_path)
    return run


def write_dated(folder: Path, date: str) -> Path:
    content = results(strategies=("on_demand", "lru"), batch_sizes=(1, 2), num_runs=2)
    content["environment"]["date"] = date
    return write_run(folder, content)


def test_a_folder_gets_its_page_and_figures(report, tmp_path):
    folder = write_dated(tmp_path / "run", "2025-01-01T00:00:00+00:00")
    record, err = report(folder)
    assert err == ""
    assert record == {
        "report": str(folder / "report.md"),
        "page": str(folder / "report.html"),
        "figures": str(folder / "figures"),
    }
    page = (folder / "report.md").read_text()
    drawn = sorted(path.name for path in (folder / "figures").glob("*.png"))
    assert len(drawn) > 5
    assert all(f"figures/{name}" in page for name in drawn)


def test_without_a_folder_comes_the_newest_run(report, tmp_path):
    """By its date, not by its name; other reports' results are no runs."""
    reports = tmp_path / "reports"
    write_dated(reports / "b", "2025-01-01T00:00:00+00:00")
    write_dated(reports / "a", "2025-03-01T00:00:00+00:00")
    (reports / "c").mkdir()
    (reports / "c" / "results.json").write_text('{"schema": "other/1"}')
    record, _ = report()
    assert record["report"] == str(Path("reports") / "a" / "report.md")
    assert not (reports / "b" / "report.md").exists()


def test_without_any_run_the_default_bench_comes_first(report, tmp_path, monkeypatch):
    def bench(out: Path) -> None:
        print("the table of the run")
        write_dated(out, "2025-01-01T00:00:00+00:00")

    monkeypatch.setattr(sys.modules["moejax.cli.report"], "bench", bench)
    record, err = report()
    assert "running the default bench first" in err
    assert "the table of the run" in err
    assert Path(record["report"]).parent.parent == Path("reports")
    assert (tmp_path / record["report"]).is_file()


def test_a_report_that_a_script_wrote_gets_its_page(report, capsys, tmp_path):
    (tmp_path / "results.json").write_text('{"schema": "moejax.loading/1"}')
    assert cli.main(["report", str(tmp_path)]) == 4
    (tmp_path / "report.md").write_text(
        "# Loading\n\n![rates](figures/rates.png)\n\n*Rates* ([SVG](figures/rates.svg))\n"
    )
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "rates.svg").write_text("<svg></svg>")
    capsys.readouterr()
    record, err = report(tmp_path)
    assert (record, err) == ({"page": str(tmp_path / "report.html")}, "")
    page = (tmp_path / "report.html").read_text()
    assert "<title>Loading</title>" in page
    assert "data:image/svg+xml" in page
    assert "SVG" not in page
    assert cli.main(["report", str(tmp_path), "--constraint", "memory=2GB"]) == 2
    assert "is no run of strategies" in capsys.readouterr().err


def write_pair(folder: Path) -> tuple[Path, Path]:
    pair = []
    for name, factor in (("a", 1.0), ("b", 0.9)):
        content = results(strategies=("on_demand", "lru"), batch_sizes=(1, 2), num_runs=3)
        for row in content["grid"]:
            row["latency_s"] = {kind: factor * value for kind, value in row["latency_s"].items()}
        content["settings"]["slots"] = [30 if name == "a" else 16] * 24
        pair.append(write_run(folder / name, content))
    return pair[0], pair[1]


def test_two_runs_side_by_side(report, tmp_path):
    a, b = write_pair(tmp_path)
    found, err = report("--compare", a, b / "results.json", "--out", "both.json")
    assert found["is_paired"]
    assert found["differences"] == [{"field": "settings/slots", "a": [30] * 24, "b": [16] * 24}]
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["b_s"] == pytest.approx(0.9 * row["a_s"])
        assert row["b_over_a_interval"] == pytest.approx([0.9, 0.9])
        assert row["a_interval_s"][0] <= row["a_s"] <= row["a_interval_s"][1]
        assert row["verdict"] == "B is faster"
    assert "the same requests" in err
    assert json.loads((tmp_path / "both.json").read_text()) == found


def test_comparing_writes_nothing_unasked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = write_pair(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", "--compare", str(a), str(b), "-o", "md"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "| settings/slots | 30 (24 times) | 16 (24 times) |" in out
    assert out.count("| B is faster |") == 4
    assert cli.main(["report", "--compare", str(a), str(b), "-o", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--compare", "a", "other"], 2, "a step of one is other work"),
        (["--compare", "a", "engine"], 4, "has schema 'moejax.bench-engine/1'"),
        (["--compare", "a", "nowhere"], 4, "nowhere has no results.json"),
        (["--compare", "a", "a", "--out", "c.txt"], 2, "not a .json file"),
        (["b", "--compare", "a", "a"], 2, "b is a third run"),
        (["a", "--out", "c.json"], 2, "no meaning without --compare"),
        (["--compare", "a"], 2, "requires 2 arguments"),
    ],
)
def test_runs_that_cannot_be_compared(capsys, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    write_dated(tmp_path / "a", "2025-01-01T00:00:00+00:00")
    write_run(tmp_path / "other", results(model="tiny-moe", num_runs=1))
    write_run(tmp_path / "engine", {"schema": "moejax.bench-engine/1"})
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "\n\nhint: " in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("full"), full_results())


@pytest.fixture
def undrawn(monkeypatch):
    """Figures have their own tests; here they would only take time."""
    monkeypatch.setattr("moejax.report._write.FIGURES", {})


def test_constraints_are_answered_on_stdout_and_in_the_report(full, undrawn, capsys):
    asked = ["report", str(full), "--constraint", "memory=2GB", "--constraint", "complexity=4"]
    assert cli.main([*asked, "-o", "json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["batch_size"] for row in rows] == [1, 16]
    assert {row["strategy"] for row in rows} <= {"on_demand", "top_k"}
    assert all(row["memory_bytes"] <= 2e9 for row in rows)
    page = (full / "report.md").read_text()
    assert "Wanted: memory at most 2.00 GB and complexity at most 4.00." in page
    assert f"wrote {full / 'report.md'}" in err


def test_constraints_come_from_a_file_too(full, undrawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moejax.toml").write_text('[report]\nconstraint = ["memory=2GB", "hit=0.1"]\n')
    assert cli.main(["report", str(full), "-o", "json"]) == 0
    assert "hit at least 10.0 %" in json.loads(capsys.readouterr().out)[0]["excluded_by"]
    monkeypatch.setenv("MOEJAX_CONSTRAINT", "memory=3GB")
    assert cli.main(["report", str(full), "-o", "json"]) == 0
    assert list(json.loads(capsys.readouterr().out)[0]["excluded_by"]) == ["memory at most 3.00 GB"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--constraint", "colour=red"), 2, "'colour=red' is not known"),
        (("--constraint", "memory=much"), 2, "memory: 'much' is not a size"),
        (("--constraint", "memory=1kB"), 3, "nothing in this run meets memory at most 1.00 kB"),
        (("--price", "a6000=1"), 2, "this run has no card 'a6000'"),
        (("--price", "large=free"), 2, "'large=free' is not the price of a card"),
    ],
)
def test_what_cannot_be_met_or_read_is_one_line_and_a_cure(
    full, undrawn, capsys, arguments, code, said
):
    assert cli.main(["report", str(full), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "\nhint: " in err
    assert "Traceback" not in err


def test_a_price_reaches_the_report(full, undrawn, capsys):
    assert cli.main(["report", str(full), "--price", "large=9000"]) == 0
    assert "| `large` | 9,000 USD |" in without_links((full / "report.md").read_text())
