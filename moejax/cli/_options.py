"""Options that several commands share, and readers for the lists they take."""

import contextlib
import math
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from moejax.errors import UsageError
from moejax.units import parse_bytes

from ._output import OutputFormat

DEFAULT_MODEL = "qwen1.5-moe-a2.7b"
DEFAULT_HARDWARE = "rtx-3090"

EXIT_CODES = (
    "Exit codes: 0 ok, 1 failure, 2 usage, 3 infeasible budget, 4 bad input file, "
    "5 backend or out of memory, 130 interrupted."
)
"""Stands below the help of every command."""


def _model_names() -> list[str]:
    from moejax.cards import MODELS

    return list(MODELS)


def _hardware_names() -> list[str]:
    from moejax.cards import HARDWARE

    return list(HARDWARE)


def _trace_names() -> list[str]:
    from moejax.trace import TRACES

    return list(TRACES)


ModelOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        autocompletion=_model_names,
        help="Card name, card file, config.json, checkpoint folder or hub id.",
    ),
]
RoutedModelOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        autocompletion=_model_names,
        help="Card name, card file, config.json, checkpoint folder or hub id; default: the model "
        f"of the trace or workload, else {DEFAULT_MODEL}.",
    ),
]
HardwareOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--hardware",
        metavar="PROFILE",
        autocompletion=_hardware_names,
        help="Hardware profile: its name or its file.",
    ),
]
TraceOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="TRACE",
        autocompletion=_trace_names,
        help="Recorded routing: a file of `trace record` or `trace import`, or a name: small-moe.",
    ),
]
WorkloadOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--workload", metavar="NAME", help="Synthetic routing to use where no trace is given."
    ),
]
SeedOption: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything that is drawn.")
]
OutOption: TypeAlias = Annotated[
    Path | None, typer.Option("--out", metavar="PATH", help="Where to write the result.")
]
OutputOption: TypeAlias = Annotated[
    OutputFormat, typer.Option("--output", "-o", help="Format on stdout.")
]
QuickOption: TypeAlias = Annotated[
    bool, typer.Option("--quick", help="Smaller sweeps: seconds instead of minutes.")
]
DevicesOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--devices",
        min=1,
        metavar="N",
        help="Devices that share the simulation, or parts of a CPU; the numbers stay the same.",
    ),
]
OfflineOption: TypeAlias = Annotated[
    bool, typer.Option("--offline", help="Never download a model's config.json.")
]


def prepare_devices(num_devices: int) -> None:
    """Lets a CPU stand for several devices; must come before anything is computed."""
    if num_devices == 1:
        return
    import jax

    # Where something was computed already, there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_devices)


def parse_names(text: str, option: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Reads a comma list of names, each once.

    Args:
      text: E.g. `lru,lfu,oracle`.
      option: The option's name, for the error.
      known: The names allowed; empty allows any.

    Raises:
      UsageError: The list is empty, or holds an unknown name or one name twice.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if known and name not in known]
    if unknown:
        raise UsageError(f"{option}: {unknown[0]!r} is not known", f"Known: {', '.join(known)}.")
    if not names or len(set(names)) < len(names):
        raise UsageError(
            f"{option}: {text!r} is not a list of different names", "Write names with commas: a,b."
        )
    return names


def parse_ints(
    text: str, option: str, *, minimum: int = 0, maximum: int | None = None
) -> tuple[int, ...]:
    """Reads a comma list of whole numbers, each once, in the order given.

    Args:
      text: E.g. `4,8,16,30`.
      option: The option's name, for the error.
      minimum: Smallest number allowed.
      maximum: Largest number allowed; None for no limit.

    Raises:
      UsageError: The list is empty, or an item is no whole number, out of range or repeated.
    """
    span = f"from {minimum}" + (f" to {maximum}" if maximum is not None else "")
    cure = f"Write whole numbers {span} with commas: {minimum + 1},{minimum + 3}."
    try:
        numbers = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a list of whole numbers", cure) from None
    for number in numbers:
        if number < minimum or (maximum is not None and number > maximum):
            raise UsageError(f"{option}: {number} is out of range", cure)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"{option}: {text!r} repeats a number", cure)
    return numbers


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Reads a comma list of positive numbers, each once, in the order given.

    Raises:
      UsageError: The list is empty, or an item is no positive finite number or repeated.
    """
    cure = "Write positive numbers with commas: 0.5,1,2."
    try:
        numbers = tuple(float(item) for item in text.split(","))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a list of numbers", cure) from None
    for number in numbers:
        if not 0 < number < math.inf:
            raise UsageError(f"{option}: {number:g} is out of range", cure)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"{option}: {text!r} repeats a number", cure)
    return numbers


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Reads a comma list of sizes such as `2GB,4000MiB` as bytes, in the order given.

    Raises:
      UsageError: An item is not a size.
    """
    return tuple(parse_size(item, option) for item in text.split(","))


def parse_size(text: str, option: str) -> int:
    """Reads a size such as `2GB` as bytes.

    Raises:
      UsageError: It is not a size; the message names the option.
    """
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error.cause}", error.hint) from None
