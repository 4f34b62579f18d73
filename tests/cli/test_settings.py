from pathlib import Path

import pytest
import typer
from typer.main import get_command

from moejax import cli
from moejax.cli._settings import load_settings
from moejax.errors import BadFileError, UsageError


@pytest.fixture
def root():
    app = typer.Typer()
    trace = typer.Typer(name="trace")

    @app.command()
    def bench(
        seed: int = 0,
        batch_sizes: str = "1",
        quick: bool = typer.Option(False, "--quick"),
        trace: str = typer.Option("", "--trace", "-t"),
        is_measured: bool = typer.Option(True, "--no-measure"),
    ) -> None: ...

    @trace.command("import")
    def import_(source: str, seed: int = 0, model: str = "") -> None: ...

    app.add_typer(trace)
    return get_command(app)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_set_changes_nothing(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings(root, None, {}) == {"bench": {}, "trace": {"import": {}}}


def test_the_nearer_setting_wins(root, tmp_path):
    path = write(tmp_path / "c.toml", "seed = 1\nmodel = 'top'\n[trace.import]\nmodel = 'near'\n")
    settings = load_settings(root, path, {})
    assert settings == {"bench": {"seed": 1}, "trace": {"import": {"seed": 1, "model": "near"}}}
    settings = load_settings(root, path, {"MOEJAX_SEED": "2"})
    assert settings["bench"]["seed"] == settings["trace"]["import"]["seed"] == "2"
    settings = load_settings(root, path, {"MOEJAX_SEED": "2", "MOEJAX_TRACE_IMPORT_SEED": "3"})
    assert settings["bench"]["seed"] == "2"
    assert settings["trace"]["import"]["seed"] == "3"


def test_names_are_those_of_the_options(root, tmp_path):
    path = write(
        tmp_path / "c.toml", "[bench]\nbatch-sizes = [1, 2, 4]\nno-measure = true\nquick = true\n"
    )
    settings = load_settings(root, path, {"MOEJAX_BENCH_TRACE": "x"})
    assert settings["bench"] == {
        "batch_sizes": "1,2,4",
        "is_measured": True,
        "quick": True,
        "trace": "x",
    }


def test_trace_is_an_option_by_value_and_a_group_by_table(root, tmp_path):
    path = write(tmp_path / "c.toml", "trace = 'a.safetensors'\n")
    assert load_settings(root, path, {})["bench"] == {"trace": "a.safetensors"}


@pytest.mark.parametrize(("text", "value"), [("1", True), ("no", False), ("TRUE", True)])
def test_flags_read_words(root, monkeypatch, tmp_path, text, value):
    monkeypatch.chdir(tmp_path)
    assert load_settings(root, None, {"MOEJAX_QUICK": text})["bench"]["quick"] is value


def test_a_flag_that_is_no_truth_value_is_refused(root, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="MOEJAX_QUICK='perhaps'"):
        load_settings(root, None, {"MOEJAX_QUICK": "perhaps"})
    assert load_settings(root, None, {"MOEJAX_QUICK": ""})["bench"] == {}


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("sed = 1", "'sed' is no option", "'seed'"),
        ("[bensh]\nseed = 1", "'bensh' is no command", "'bench'"),
        ("[bench]\nmodel = 'x'", "'model' is no option of bench", "Known: "),
        ("[trace.impart]\nseed = 1", "'impart' is no command", "'import'"),
        ("seed = 2026-01-01", "is not a setting", "Write"),
        ("batch-sizes = []", "is not a setting", "Write"),
        ("seed = ", "is not TOML", "line"),
        ("seed = 1\nseed = 2", "is not TOML", "line"),
    ],
)
def test_a_wrong_file_is_a_bad_file(root, tmp_path, text, cause, hint):
    path = write(tmp_path / "c.toml", text)
    with pytest.raises(BadFileError) as caught:
        load_settings(root, path, {})
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_a_missing_or_binary_file_is_a_bad_file(root, tmp_path):
    with pytest.raises(BadFileError, match="cannot be read"):
        load_settings(root, tmp_path / "none.toml", {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFileError, match="is not TOML"):
        load_settings(root, tmp_path / "binary.toml", {})


@pytest.mark.parametrize(
    ("flag", "variable", "file", "shown"),
    [
        (None, None, None, ""),
        (None, None, "file", "'file'"),
        (None, "variable", "file", "'variable'"),
        ("flag", "variable", "file", "'flag'"),
    ],
)
def test_flag_before_variable_before_file_before_default(
    tmp_path, monkeypatch, capsys, flag, variable, file, shown
):
    """Through the real program, on an option whose bad value is quoted in the error."""
    monkeypatch.chdir(tmp_path)
    if file:
        write(tmp_path / "moejax.toml", f"model = '{file}'\n")
    if variable:
        monkeypatch.setenv("MOEJAX_MODEL", variable)
    argv = ["estimate", "--hardware", "rtx-3090", *(["--model", flag] if flag else [])]
    code = cli.main(argv)
    err = capsys.readouterr().err
    if flag or variable or file:
        assert code == 2
        assert f"unknown model {shown}" in err
    else:
        assert (code, err) == (0, "")


def test_a_configuration_file_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "other.toml", "model = 'from-the-file'\n")
    assert cli.main(["--config", str(path), "estimate"]) == 2
    assert "'from-the-file'" in capsys.readouterr().err
    monkeypatch.setenv("MOEJAX_CONFIG", str(tmp_path / "none.toml"))
    assert cli.main(["estimate"]) == 4
    assert "none.toml cannot be read" in capsys.readouterr().err
