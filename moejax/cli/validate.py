"""`moejax validate`: files against their formats, or moejax against outside numbers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moejax.errors import BadFileError, MoejaxError, UsageError

from ._against import validate_against
from ._options import OutputOption, SeedOption
from ._output import OutputFormat, emit
from ._outside import check_outside_numbers
from ._outside_hardware import validate_hardware
from ._progress import say, show_progress

_RUN_FILE = "results.json"
_CONFIG_FILE = "config.json"
# The model whose weights moejax reads; they lie in such files, or an index stands for them.
_PORTED = "qwen2_moe"
_WEIGHTS = "*.safetensors*"


def validate(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="Traces, model cards, checkpoint folders, hardware profiles, run folders.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="RESULTS.json", help="A run of the engine to predict."),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            metavar="PROFILE",
            help="Its card's measurements that no fit saw; for --against: what predicts.",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="For --against: the run with its ladder."),
    ] = None,
    seed: SeedOption = 0,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Check files, or without PATH compare moejax with numbers from outside.

    With paths: one record a path says what it is, what was checked and what is wrong with it; any
    bad one makes the exit code 4. Of a Qwen1.5-MoE checkpoint the weights are checked too, all but
    their values. Without: sizes against arithmetic, the RTX 3090's copy law against sizes that the
    fit did not see, profiles against decode steps that others published and that we measured, and
    calibrated workloads against published hit curves and statistics; any miss makes the exit code
    1, unless it is known and explained.

    With --hardware alone: every measurement of a profile's card that no fit saw, others' and our
    own, beside the prediction; for published decode steps the error and the law of step time
    against misses by source, and what a source does not state.

    With --against: the ladder of an engine's run, each case as the profile predicts it with a 90 %
    interval, as the timeline has it and as it was measured, beside two simpler laws; differing
    counts make the exit code 1.

    Example: moejax validate gpt-oss.safetensors reports/first
    """
    if against is not None:
        if paths:
            raise UsageError("--against with paths", "Check files in a command of its own.")
        validate_against(against, hardware, out, output, seed)
        return
    if out is not None:
        raise UsageError("--out without --against", "Name a run of the engine.")
    if hardware:
        if paths:
            raise UsageError("--hardware with paths", "Check files in a command of its own.")
        validate_hardware(hardware, output)
        return
    if paths:
        records = [_check_path(path) for path in paths]
        emit(records, output, columns=("path", "kind", "ok", "checked", "problem"))
        bad = [record for record in records if not record["ok"]]
        if bad:
            many = "`moejax validate -o json` gives a hint for each."
            raise BadFileError(
                _counted(len(bad), len(records), "path", "not sound"),
                bad[0]["hint"] if len(bad) == 1 else many,
            )
        return
    with show_progress("validating") as progress:
        checks = [check._asdict() for check in check_outside_numbers(seed, progress)]
    emit(checks, output)
    num_missed = sum(check["ok"] is False for check in checks)
    if num_missed:
        raise MoejaxError(
            _counted(num_missed, len(checks), "check", "missed"),
            "`moejax validate -o json` gives every number in full and its source.",
        )
    num_known = sum(check["ok"] is None for check in checks)
    say(f"all {len(checks) - num_known} checks hold")
    if num_known:
        say(f"{num_known} not counted: a known miss, explained by its source in the table")


def _check_path(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"path": str(path), "kind": None, "ok": False, "checked": None}
    try:
        record["kind"] = _kind(path)
        record["checked"] = _READERS[record["kind"]](path)
    except MoejaxError as error:
        return record | {"problem": error.cause, "hint": error.hint}
    return record | {"ok": True, "problem": None, "hint": None}


def _kind(path: Path) -> str:
    """What a path claims to be, by its name first and by its fields where several share a name.

    Raises:
      BadFileError: It is nothing that moejax reads, or cannot be read.
    """
    from moejax.cards import read_card

    if path.is_dir():
        for name, kind in ((_RUN_FILE, "run"), (_CONFIG_FILE, "model")):
            if (path / name).exists():
                return kind
        raise BadFileError(
            f"{path} holds neither {_RUN_FILE} nor {_CONFIG_FILE}",
            "Name a folder written by `moejax bench --out`, or a checkpoint.",
        )
    if path.suffix == ".safetensors":
        return "trace"
    if path.name == _RUN_FILE:
        return "run"
    if path.suffix == ".json":
        return "hardware" if "constants" in read_card(path) else "model"
    if path.suffix == ".toml":
        fields = read_card(path)
        for field, kind in (("config", "model"), ("constants", "hardware")):
            if field in fields:
                return kind
        raise BadFileError(
            f"{path} has neither [config] nor [constants]",
            "A model card has the one, a hardware profile the other.",
        )
    if not path.exists():
        raise BadFileError(f"{path} does not exist", "Check the path.")
    raise BadFileError(
        f"{path} has no ending that tells what it is",
        "Traces end in .safetensors, cards in .toml or .json; recordings are checked by "
        "`moejax trace import`.",
    )


def _read_trace(path: Path) -> str:
    from moejax.trace import load_trace

    load_trace(path)
    return "header, hash and values"


def _read_model(path: Path) -> str:
    from moejax.cards import load_model, read_card

    load_model(path)
    if not path.is_dir():
        return "fields"
    if read_card(path / _CONFIG_FILE).get("model_type") != _PORTED:
        return f"{_CONFIG_FILE}, no weights: moejax reads those of {_PORTED}"
    if not any(path.glob(_WEIGHTS)):
        return f"{_CONFIG_FILE}; there are no *.safetensors beside it"
    from moejax.qwen_moe.params import check

    tensors = check(path).tensors
    num_files = len({info.path for info in tensors.values()})
    return (
        f"{_CONFIG_FILE}; names, types, shapes and places of {len(tensors):,} tensors in "
        f"{num_files} file{'s' * (num_files > 1)}, not their values"
    )


def _read_hardware(path: Path) -> str:
    from moejax.cards import load_hardware
    from moejax.cost import from_hardware

    from_hardware(load_hardware(path))
    return "fields"


def _read_run(path: Path) -> str:
    from moejax.report import read_run

    read_run(path if path.is_dir() else path.parent)
    return "fields"


_READERS = {
    "trace": _read_trace,
    "model": _read_model,
    "hardware": _read_hardware,
    "run": _read_run,
}


def _counted(num_bad: int, num_all: int, noun: str, state: str) -> str:
    verb = "is" if num_bad == 1 else "are"
    return f"{num_bad} of {num_all} {noun}{'s' * (num_all > 1)} {verb} {state}"
