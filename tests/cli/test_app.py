import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer

import moejax
from moejax import cli
from moejax.cli import _app
from moejax.errors import BackendError, BadFileError, InfeasibleBudgetError, UsageError


@pytest.fixture
def failing(monkeypatch):
    """Makes `moejax fail` raise what is given, through the real program."""

    def install(error: BaseException) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.callback()(lambda: None)

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(_app, "app", app)

    return install


class JaxRuntimeError(RuntimeError):
    """Named as JAX names what comes out of XLA."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("0 runs", "Give 1."), 2, "error: 0 runs\n\nhint: Give 1.\n"),
        (InfeasibleBudgetError("too small", "17MB."), 3, "error: too small\n\nhint: 17MB.\n"),
        (BadFileError("cut off"), 4, "error: cut off\n"),
        (BackendError("no GPU", "Use a CPU."), 5, "error: no GPU\n\nhint: Use a CPU.\n"),
    ],
)
def test_each_kind_of_mistake_has_its_code(failing, capsys, error, code, text):
    failing(error)
    assert cli.main(["fail"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", text)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 5, "out of memory"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), 5, "out of memory: RESOURCE_EXH"),
        (JaxRuntimeError("INTERNAL: broken\nmore"), 5, "backend failed: INTERNAL: broken\n"),
        (RuntimeError("Unable to initialize backend 'cuda'"), 5, "backend failed: Unable"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (RecursionError(), 1, "RecursionError: "),
    ],
)
def test_surprises_end_without_a_traceback(failing, capsys, error, code, text):
    failing(error)
    assert cli.main(["fail"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert "\n\nhint: " in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(failing, capsys, monkeypatch):
    monkeypatch.setenv("MOEJAX_DEBUG", "1")
    failing(KeyError("x"))
    assert cli.main(["fail"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["bogus"], "no such command 'bogus'"),
        (["env", "--bogus"], "no such option: --bogus"),
        (["env", "-o", "xml"], "'xml'"),
        (["env", "surplus"], "surplus"),
        (["estimate", "--batch-size", "0"], "--batch-size"),
        (["estimate", "--batch-size", "many"], "--batch-size"),
        (["estimate", "--model"], "--model"),
        (["fit"], "SOURCE"),
        (["trace"], "missing command"),
        (["trace", "make"], "--out"),
        (["trace", "make", "--out", "t.safetensors", "--seed", "-1"], "--seed"),
        (["--config"], "--config"),
    ],
)
def test_usage_errors_name_the_word_and_exit_2(capsys, argv, cause):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, empty, hint = err.splitlines()
    assert first.startswith("error: ")
    assert cause in first
    assert (empty, hint.split(": ")[0]) == ("", "hint")
    assert "--help` lists" in hint


COMMANDS = [["bench"], ["tune-cache"], ["report"], ["simulate"], ["estimate"], ["fit"]]
COMMANDS += [["generate"], ["validate"], ["env"]]
COMMANDS += [["trace", name] for name in ("import", "make", "record", "info")]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_an_example_and_the_exit_codes(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([*words, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"Example: moejax {' '.join(words)}" in out
    assert "Exit codes: 0 ok" in out
    assert err == ""


def test_without_arguments_comes_the_help(capsys):
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: moejax" in out
    assert all(words[0] in out for words in COMMANDS)
    assert "Exit codes" in out
    assert err == ""


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(capsys, flag):
    assert cli.main([flag]) == 0
    assert capsys.readouterr() == (f"moejax {moejax.__version__}\n", "")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "moejax", *arguments]
    return subprocess.run(command, env=environment, text=True, check=False, **options)


def test_the_process_exits_with_the_code():
    done = run("bogus", capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_leaves_early_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = run("--version", stdout=write_end, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_offered(shell):
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "_MOEJAX_COMPLETE": f"source_{shell}"}
    program = "import sys; from moejax.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "moejax" in done.stdout


def run_program(body: str, **options) -> subprocess.CompletedProcess:
    """The program, as a process of its own, with a command `fail` that does `body`."""
    program = (
        "import os, signal, sys, time\n"
        "from moejax.cli import _app\n"
        f"def fail():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "_app.app.command()(fail)\n"
        "sys.argv = ['moejax', 'fail']\n"
        "_app.run()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, **options
    )


def test_an_interrupt_that_an_import_reports_as_a_failure_is_an_interrupt():
    done = run_program("""
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        except KeyboardInterrupt:
            raise ImportError("half of a module")
    """)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interrupt_that_a_callback_swallows_comes_again():
    """As in the callback that JAX has at every garbage collection."""
    done = run_program("""
        import gc

        def interrupt(*_):
            gc.callbacks.remove(interrupt)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)

        gc.callbacks.append(interrupt)
        try:
            gc.collect()
            time.sleep(9)
            print("went on")
        finally:
            print("kept")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (130, "kept\n", "")


def test_other_errors_of_a_callback_are_shown_as_ever():
    done = run_program("""
        class Careless:
            def __del__(self):
                raise ValueError("in a finalizer")

        Careless()
    """)
    assert done.returncode == 0
    assert "ValueError: in a finalizer" in done.stderr


def test_a_second_interrupt_ends_at_once():
    done = run_program("""
        print("kept", flush=True)
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(9)
            except KeyboardInterrupt:
                pass
    """)
    assert (done.returncode, done.stdout, done.stderr) == (130, "kept\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_said():
    with open("/dev/full", "w") as full:
        program = "import sys; from moejax.cli import run; sys.argv = ['moejax', '-V']; run()"
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output cannot be written: No space left")


# --- compiled programs are kept ----------------------------------------------------------------


def test_compiled_programs_are_kept_where_caches_are(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "9"}
    _app.keep_programs(environ)
    folder = Path(environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "moejax")
    assert environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "9"


def test_another_place_for_them_stands(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    _app.keep_programs(environ)
    assert environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_without_a_place_for_them_nothing_is_set(tmp_path):
    (tmp_path / "file").write_text("")
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    _app.keep_programs(environ)
    assert list(environ) == ["XDG_CACHE_HOME"]


def test_the_second_process_finds_the_programs_of_the_first(tmp_path):
    code = (
        "import os\n"
        "from moejax.cli import _app\n"
        "_app.keep_programs(os.environ)\n"
        "import jax\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
    )
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    counts = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
        counts.append(len(list(tmp_path.rglob("*-cache"))))
    assert counts[0] == counts[1] > 0
