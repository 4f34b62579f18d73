import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from moejax.errors import BadFileError, UsageError
from moejax.results import read_json, to_plain, write_bytes, write_json, write_text


def test_json_survives_the_round_trip(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "results.json"
    value = {"name": "µ", "count": 3, "share": 0.1, "none": None, "list": [1, [True]]}
    assert write_json(path, value) == path
    assert read_json(path) == value


def test_arrays_become_lists_and_what_is_not_finite_becomes_null(tmp_path: Path):
    path = write_json(
        tmp_path / "a.json",
        {
            "array": np.array([[1.0, np.nan], [np.inf, 4.0]]),
            "number": np.float32(0.5),
            "integer": np.int64(7),
            "flag": np.bool_(True),
            "path": Path("a") / "b",
            "nan": float("nan"),
        },
    )
    assert json.loads(path.read_text()) == {
        "array": [[1.0, None], [None, 4.0]],
        "number": 0.5,
        "integer": 7,
        "flag": True,
        "path": "a/b",
        "nan": None,
    }


def test_what_has_no_plain_form_is_refused_before_the_file_is_touched(tmp_path: Path):
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(TypeError, match="no plain form"):
        write_json(path, {"thing": object()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UsageError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_that_of_a_plainly_written_file(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    written = write_bytes(tmp_path / "ours", b"")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path):
    target = write_text(tmp_path / "target", "old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("place", ["folder", "file/below", "x" * 300])
def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path, place: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        write_text(tmp_path / place, "text")
    assert caught.value.hint


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe{}", b"[" * 100_000, b"{} {}"],
    ids=["empty", "cut", "nan", "infinity", "not utf-8", "deep", "two values"],
)
def test_what_is_not_json_is_a_bad_file(tmp_path: Path, data: bytes):
    path = write_bytes(tmp_path / "a.json", data)
    with pytest.raises(BadFileError, match="is not JSON"):
        read_json(path)


def test_a_missing_file_and_a_folder_are_bad_files(tmp_path: Path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(BadFileError, match="cannot be read"):
            read_json(path)


def test_records_become_dicts_by_field():
    from moejax.results import Measurement

    assert to_plain(Measurement("copy", "s", (1.0, 2.0))) == {
        "name": "copy",
        "unit": "s",
        "samples": [1.0, 2.0],
    }
