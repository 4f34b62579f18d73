"""Every committed report has the commands that make it again, and a page of its own text."""

import json
import re
import shlex
from pathlib import Path

import pytest

from moejax.claims import list_claims, load_claims
from moejax.cli import main
from moejax.report import page_of

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"
FOLDERS = sorted(path.name for path in REPORTS.iterdir() if path.is_dir())
LIST = (REPORTS / "README.md").read_text(encoding="utf-8")
ROWS = {
    name: [words for words in re.findall(r"`([^`]+)`", row) if " " in words or ".py" in words]
    for name, row in re.findall(r"^\| \[([\w-]+)]\([^)]*\) \|(.*)\|$", LIST, re.MULTILINE)
}


def test_every_folder_is_in_the_list():
    assert sorted(ROWS) == FOLDERS
    for name in FOLDERS:
        assert f"[{name}]({name}/report.md)" in LIST


@pytest.mark.parametrize("name", ROWS)
def test_the_commands_of_a_report_are_spelled_as_they_are_known(name: str, capsys):
    assert ROWS[name]
    for command in ROWS[name]:
        program, *words = shlex.split(command)
        options = [word for word in words if word.startswith("--")]
        if program == "moejax":
            known = 2 if words[0] == "trace" else 1
            assert main([*words[:known], "--help"]) == 0
            said = capsys.readouterr().out
        else:
            assert program == "python"
            said = (ROOT / words[0]).read_text(encoding="utf-8")
        assert [option for option in options if option not in said] == []


@pytest.fixture(scope="module")
def run() -> dict:
    return json.loads((REPORTS / "rtx-3090/results.json").read_text(encoding="utf-8"))


def test_the_committed_audit_has_every_claim_and_every_conflict(run):
    claims = load_claims()
    assert [row["claim"] for row in run["audit"]] == [one.path for one in list_claims(claims)]
    flagged = {name for row in run["audit"] for name in row["conflicts"]}
    assert flagged == {entry["id"] for entry in claims["known_conflicts"]}


def test_the_run_of_the_card_is_that_of_the_listed_command(run):
    assert shlex.join(run["environment"]["argv"]) == ROWS["rtx-3090"][0]
    assert not run["environment"]["commit"].endswith("+dirty")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_page_is_the_text(name: str):
    """Otherwise `moejax report reports/NAME` makes it so."""
    page = REPORTS / name / "report.html"
    assert page.read_text(encoding="utf-8") == page_of(REPORTS / name)
