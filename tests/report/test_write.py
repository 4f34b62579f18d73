import subprocess
import sys
from pathlib import Path

import pytest

from moejax.errors import BadFileError, UsageError
from moejax.report import FIGURES, write_report
from moejax.report.figures import CLAIMS_FIGURES, FURTHER_FIGURES

from ._factory import results, write_run


def content_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_same_run_same_bytes_and_nothing_left_over(tmp_path: Path):
    content = results(strategies=("on_demand", "oracle", "lru"), batch_sizes=(1, 2), num_runs=2)
    told = []
    for name in ("one", "two"):
        folder = write_run(tmp_path / name, content)
        (folder / "figures").mkdir()
        (folder / "figures" / "tiers.png").write_bytes(b"from an earlier report")
        path = write_report(folder, progress=lambda *said: told.append(said))
        assert path == folder / "report.md"
    one, two = content_of(tmp_path / "one"), content_of(tmp_path / "two")
    assert one == two
    left_out = ("tiers", *CLAIMS_FIGURES, *FURTHER_FIGURES.values())
    drawn = [name for name in FIGURES if name not in left_out]
    figures = {f"figures/{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert set(one) == {"results.json", "report.md", "report.html"} | figures
    assert all(one[name].startswith(b"\x89PNG") for name in figures if name.endswith("png"))
    assert len(one["report.html"]) < 3_000_000
    assert told[-1] == (len(FIGURES) + 2, len(FIGURES) + 2, "report.html")
    text = one["report.md"].decode()
    assert all(f"figures/{name}.png" in text for name in drawn)
    assert str(tmp_path) not in text


def test_bad_results_leave_the_old_report(tmp_path: Path):
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "report.md").write_text("old")
    with pytest.raises(BadFileError):
        write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == "old"


def test_a_run_that_leads_to_what_it_does_not_have(tmp_path: Path, monkeypatch):
    content = results(strategies=("lru",), batch_sizes=(1,), num_runs=1)
    content["hardware"]["note"] = "[so much](results.json#/grid/7)"
    monkeypatch.setattr("moejax.report._write.FIGURES", {})
    with pytest.raises(BadFileError, match=r"results\.json names a place that is not in it"):
        write_report(write_run(tmp_path, content))
    assert not list(tmp_path.glob("report.*"))


def test_folder_that_cannot_be_written(tmp_path: Path):
    write_run(tmp_path, results(strategies=("lru",), batch_sizes=(1,), num_runs=1))
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(UsageError) as caught:
        write_report(tmp_path)
    assert caught.value.hint


def test_jax_is_not_imported():
    code = "import sys, moejax.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
