"""The rules of the house that a reader relies on, checked on every module."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moejax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    path
    for folder in ("moejax", "models", "scripts", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".toml", ".md", ".csv", ".json") and "__pycache__" not in path.parts
]

# Floors, lowest first; a module imports from lower floors or its own folder. The package's own
# `__init__` holds the version and may be imported by all.
FLOORS = {
    "units": 0,
    "_types": 0,
    "errors": 0,
    "tensors": 0,
    "devices": 0,
    "cards": 1,
    "trace": 1,
    "results": 1,
    "claims": 1,
    "strategies": 2,
    "workloads": 2,
    "cost": 2,
    "qwen_moe": 2,
    "offload": 2,
    "simulate": 3,
    "engine": 3,
    "tune": 4,
    "bench": 4,
    "report": 4,
    "cli": 5,
    "__main__": 6,
}
# Within floor 0: errors know nothing, the others raise them.
ALLOWED_SIDEWAYS = {
    ("units", "errors"),
    ("tensors", "errors"),
    ("devices", "errors"),
    ("trace", "cards"),
}
# These start fast and run where jax is absent or broken, at least until a function is called.
WITHOUT_JAX = (
    "cards",
    "trace",
    "results",
    "claims",
    "units",
    "errors",
    "tensors",
    "report",
    "cli",
)
MAX_LINES = 400


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """The package's folder or file that `path` belongs to; `` for the package's own `__init__`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(nodes: list[ast.stmt] | list[ast.AST], path: Path) -> list[str]:
    """Absolute names of what import statements name, relative ones resolved."""
    names = []
    package = ["moejax", *path.relative_to(PACKAGE).parts[:-1]]
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            names += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_go_down(path: Path):
    room = room_of(path)
    if not room:
        return
    assert room in FLOORS, f"{room} has no floor: add it to FLOORS"
    imported = imported_modules(list(ast.walk(ast.parse(path.read_text()))), path)
    rooms = {name.split(".")[1] for name in imported if name.startswith("moejax.")}
    rooms &= FLOORS.keys()
    upward = {
        other
        for other in rooms - {room}
        if FLOORS[other] >= FLOORS[room] and (room, other) not in ALLOWED_SIDEWAYS
    }
    assert not upward, f"{room} (floor {FLOORS[room]}) imports {sorted(upward)}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) in WITHOUT_JAX], ids=identify
)
def test_no_jax_on_import(path: Path):
    imported = imported_modules(ast.parse(path.read_text()).body, path)
    assert not [name for name in imported if name.split(".")[0] in ("jax", "flax", "optax")]


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_public_names_are_documented(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    bare = [
        node.name
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in scope.body
        if isinstance(node, kinds) and not node.name.startswith("_")
        if not getattr(scope, "name", "").startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare, f"without a docstring: {bare}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_files_hold_one_idea(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=identify)
def test_init_only_exports(path: Path):
    """An `__init__` names the public API, and holds a registry at most."""
    allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign, ast.AnnAssign, ast.ClassDef)
    for node in ast.parse(path.read_text()).body:
        assert isinstance(node, allowed), f"line {node.lineno}: {ast.unparse(node)[:60]}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_annotations_are_read_at_run_time(path: Path):
    assert "__future__.annotations" not in imported_modules(ast.parse(path.read_text()).body, path)


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_no_path_of_one_machine(path: Path):
    words = ("home", "root", "work", "Users")
    pattern = rf"(?<![\w.~-])/(?:{'|'.join(words)})/[a-z_]\w*"
    found = re.findall(pattern, path.read_text(encoding="utf-8"))
    assert not found, found


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_nothing_is_left_unfinished(path: Path):
    marks = ("TO" + "DO", "FIX" + "ME", "raise " + "NotImplementedError")
    assert not [mark for mark in marks if mark in path.read_text()]


def test_help_starts_without_numerics():
    """Help must be instant, so nothing heavy may be loaded for it."""
    program = (
        "import sys; from moejax.cli import main; code = main(['--help']); "
        "heavy = {'jax', 'numpy', 'scipy', 'matplotlib', 'optax'} & set(sys.modules); "
        "sys.exit(str(sorted(heavy)) if heavy or code else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
