"""What the README tells a newcomer to type works, and what it shows is what comes."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from moejax.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for block in SHELL
    for line in block.splitlines()
    if line.startswith(("$ moejax", "moejax", "make"))
]
LINKS = re.findall(r"\]\(([^)#:]+)\)|^\| `([\w./-]+/[\w./-]*)`", README, re.MULTILINE)


def test_the_readme_shows_the_main_commands():
    shown = " ".join(COMMANDS)
    for command in ("make bench", "make test", "moejax tune-cache --budget 2GB", "moejax report"):
        assert command in shown


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("moejax")])
def test_commands_are_spelled_as_the_program_has_them(command: str, capsys):
    words = shlex.split(command)[1:]
    options = [word for word in words if word.startswith("--")]
    name = words[:2] if words[0] == "trace" else words[:1]
    assert main([*name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options)


@pytest.mark.parametrize("target", [c.split()[1] for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(target: str):
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted({a or b for a, b in LINKS}))
def test_paths_exist(path: str):
    assert (ROOT / path).exists()


def test_figures_of_the_results_table_are_those_of_the_run():
    run = json.loads((ROOT / "reports/rtx-3090/results.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) % \|", README, re.M)
    assert len(rows) >= 5
    for strategy, alone, crowded, hits in rows:
        mine = [r for r in run["grid"] + run["baseline"] if r["strategy"] == strategy]
        for batch_size, shown in ((1, alone), (16, crowded)):
            means = [r["latency_s"]["mean"] for r in mine if r["batch_size"] == batch_size]
            assert float(shown) == pytest.approx(1e3 * sum(means) / len(means), rel=5e-3)
        ratios = [r["hit_ratio"] for r in mine if r["batch_size"] == 1]
        assert float(hits) == pytest.approx(100 * sum(ratios) / len(ratios), abs=0.06)
