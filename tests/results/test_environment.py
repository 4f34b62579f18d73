import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import moejax
from moejax.results import _environment, capture_environment, to_plain


def test_the_environment_says_what_a_reader_asks(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path.home() / "bin" / "moejax"), "bench", "--seed", "3"])
    environment = capture_environment(seed=3)
    assert environment.argv == ("moejax", "bench", "--seed", "3")
    assert environment.seed == 3
    assert environment.versions["jax"] == jax.__version__
    assert environment.versions["moejax"] == moejax.__version__
    assert environment.versions["python"] == sys.version.split()[0]
    assert environment.backend == jax.default_backend()
    assert environment.device
    assert environment.num_cpus >= 1
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(\+dirty)?", environment.commit)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(environment.date)
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    json.dumps(to_plain(environment), allow_nan=False)


def test_the_home_folder_is_not_told(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["moejax", f"--out={tmp_path}/run", "--budget", "2GB"])
    assert capture_environment().argv == ("moejax", "--out=~/run", "--budget", "2GB")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch) -> Path:
    """A repository with one commit and the package, as the package sees itself."""
    package = tmp_path / "moejax"
    package.mkdir()
    (package / "__init__.py").write_text("one\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    monkeypatch.setattr(moejax, "__file__", str(package / "__init__.py"))
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    person = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *person, *arguments], check=True)


def test_a_changed_file_makes_the_commit_dirty(checkout: Path):
    assert re.fullmatch(r"[0-9a-f]{40}", _environment._commit())
    (checkout / "moejax" / "__init__.py").write_text("two\n")
    assert re.fullmatch(r"[0-9a-f]{40}\+dirty", _environment._commit())


def test_a_checkout_of_another_project_is_not_reported(checkout: Path, monkeypatch):
    inner = checkout / "lib" / "moejax" / "__init__.py"
    monkeypatch.setattr(moejax, "__file__", str(inner))
    inner.parent.mkdir(parents=True)
    assert _environment._commit() == "unknown"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert _environment._commit() == "unknown"
