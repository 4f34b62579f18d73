import json
import sys
from pathlib import Path

import pytest

from moejax import cli

from ..report._factory import results, write_run


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
