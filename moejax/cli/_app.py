"""The `moejax` program: its commands, and how it ends when something goes wrong."""

import os
import platform
import signal
import sys
import traceback
from collections.abc import MutableMapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

import moejax
from moejax.errors import BackendError, MoejaxError, UsageError

from . import trace
from ._options import EXIT_CODES
from ._output import print_failure
from ._settings import load_settings
from .bench import bench
from .env import env
from .estimate import estimate
from .fit import fit
from .generate import generate
from .report import report
from .simulate import simulate
from .sweep import sweep
from .tune_cache import tune_cache
from .validate import validate

COMMANDS = (bench, tune_cache, report, simulate, sweep, estimate, generate, fit, validate, env)
GROUPS = (trace.app,)

_INTERRUPTED = 130
_INTERRUPT_AGAIN_S = 0.01
# Programs that compile faster are not worth a file.
_LEAST_COMPILE_S = "0.1"

_SETTINGS = (
    "A setting is taken from its option, else from MOEJAX_COMMAND_OPTION or MOEJAX_OPTION in the "
    "environment, else from the command's table or the top of the configuration file, else the "
    "default."
)

app = typer.Typer(
    name="moejax",
    help="Which experts of a mixture-of-experts model to keep on the GPU, and what that buys.",
    epilog=f"{_SETTINGS}\n\n{EXIT_CODES}",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS:
    app.command(epilog=EXIT_CODES)(_command)
for _group in GROUPS:
    app.add_typer(_group, epilog=EXIT_CODES)


_interrupts: list[int] = []


def run() -> NoReturn:
    """Runs the program as a process of its own, and ends that process.

    The first interrupt unwinds, so that what was done is kept; a second one ends at once. Then
    nothing is torn down: JAX may be compiling in other threads, and would crash.
    """
    signal.signal(signal.SIGINT, _on_interrupt)
    signal.signal(signal.SIGALRM, _on_interrupt)
    sys.unraisablehook = _on_unraisable
    keep_programs(os.environ)
    if sys.stdout is None:  # Closed by the shell: `moejax ... >&-`.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    code = main()
    if not _interrupts:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_INTERRUPTED)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code; nothing is raised to the caller.

    Args:
      argv: The arguments after the program's name; None takes those of the process.
    """
    try:
        code = get_command(app).main(
            args=None if argv is None else list(argv), prog_name="moejax", standalone_mode=False
        )
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()  # Whoever read it has seen enough.
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        if _interrupts:  # An import that was interrupted says that it failed.
            print("interrupted", file=sys.stderr)
            return _INTERRUPTED
        if os.environ.get("MOEJAX_DEBUG"):
            traceback.print_exc()
        failure = _as_failure(error)
        print_failure(failure)
        return failure.exit_code
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Option(
            envvar="MOEJAX_CONFIG",
            metavar="FILE",
            help="Configuration file; without it moejax.toml of the working folder, if any.",
        ),
    ] = "",
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        print(f"moejax {moejax.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        # With rich the help prints itself and the text is empty.
        print(context.get_help(), end="")
        raise typer.Exit
    context.default_map = load_settings(context.command, config or None, os.environ)


def keep_programs(environ: MutableMapping[str, str]) -> None:
    """Lets JAX keep compiled programs on disk, so that a second command starts warm.

    Settings that are there already stand. Where the folder cannot be written, every command
    compiles anew.
    """
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Programs for a CPU may hold instructions that another machine of the same home lacks.
    folder = os.path.join(cache, "moejax", "programs", platform.node() or "here")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _LEAST_COMPILE_S)


def _on_interrupt(number: int, _: Any) -> None:
    if _interrupts:
        os._exit(_INTERRUPTED)
    _interrupts.append(number)
    raise KeyboardInterrupt


def _on_unraisable(unraisable: Any) -> None:
    """Lets an interrupt come again that met code out of which nothing is raised.

    JAX has Python call it at every garbage collection, so that happens in every command.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    _interrupts.clear()
    signal.setitimer(signal.ITIMER_REAL, _INTERRUPT_AGAIN_S)


def _discard_output() -> None:
    """Makes the flush at exit succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_failure(error: Exception) -> MoejaxError:
    if isinstance(error, MoejaxError):
        return error
    if _is_usage_error(error):
        return _from_usage_error(error)
    if isinstance(error, OSError) and error.filename is None:
        _discard_output()
        return MoejaxError(
            f"the output cannot be written: {error.strerror or error}",
            "Is the disk full? Send it elsewhere.",
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return BackendError(
            f"out of memory: {_first_line(error) or 'the host refused an allocation'}",
            "Take less at a time: shorter prompts, smaller batches, fewer runs or slots, --quick.",
        )
    if _is_backend_error(error):
        return BackendError(
            f"the JAX backend failed: {_first_line(error)}",
            "Look at `moejax env`; JAX_PLATFORMS=cpu runs without the accelerator.",
        )
    return MoejaxError(
        f"{type(error).__name__}: {_first_line(error)}",
        "This should not happen. Set MOEJAX_DEBUG=1 and run again to see where it did.",
    )


def _is_usage_error(error: Exception) -> bool:
    # Known by shape, not by class: newer typer carries its own copy of click.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _from_usage_error(error: Any) -> MoejaxError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "moejax"
    cause = " ".join(error.format_message().split()).rstrip(".")
    return UsageError(cause[:1].lower() + cause[1:], f"`{command} --help` lists what it takes.")


def _is_backend_error(error: Exception) -> bool:
    is_from_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return is_from_xla or "Unable to initialize backend" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
