"""`moejax fit`: a hardware profile from measurements."""

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import BadFileError, UsageError
from moejax.units import format_bytes, format_change, format_ratio

from ._options import DEFAULT_HARDWARE
from ._output import OutputFormat, emit
from ._progress import say

if TYPE_CHECKING:
    from moejax.cards import Hardware
    from moejax.cost import CsvFit

_RUN_FILE = "results.json"
_KINDS = ("transfer", "compute")


def fit(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A CSV of copies, a run folder or its results.")
    ],
    base: Annotated[
        str,
        typer.Option(
            "--base", metavar="PROFILE", help="Profile that supplies what was not measured."
        ),
    ] = "",
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="Card to fit, as the CSV spells it.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.toml", help="Where the profile goes.")
    ] = None,
    output: Annotated[
        OutputFormat | None,
        typer.Option(
            "--output", "-o", help="Print the constants so; by default the profile if no --out."
        ),
    ] = None,
) -> None:
    """Fit a hardware profile to measured copies and compute.

    SOURCE is a CSV with the columns of models/hardware/measurements/transfer.csv, of which one
    rig is fitted with every third size held out, or what `moejax bench` measured on this machine;
    where it measured an engine, its steps count too.
    The profile then works as `--hardware FILE.toml`. What scripts/bench_devices.py measured of
    several devices adds their links and all-reduce to the profile of one, --base.

    Example: moejax fit reports/run-1 --out my-card.toml
    """
    from moejax.bench import machine_profile
    from moejax.cards import load_hardware
    from moejax.cost import fit_csv, fit_devices, fit_profile, format_profile
    from moejax.results import write_text

    if out is not None and out.suffix != ".toml":
        raise UsageError(f"--out {out} is not a .toml file", "Profiles are read by that ending.")
    name = out.stem if out is not None else None
    if source.suffix == ".csv":
        found = fit_csv(
            source, gpu=gpu or None, base=load_hardware(base) if base else None, name=name
        )
        _say_evidence(found)
        profile = found.hardware
    elif gpu:
        raise UsageError(f"--gpu {gpu!r} without a CSV", "A run holds one machine only.")
    elif links := _read_links(source):
        if not base:
            raise UsageError(
                f"{source} tells only what joins several devices",
                "Give the profile of one of them with --base.",
            )
        profile = fit_devices(load_hardware(base), **links)
        profile = dataclasses.replace(profile, name=name or profile.name)
    elif engine_run := _read_engine_run(source):
        profile = machine_profile(
            engine_run, command="moejax bench", base=load_hardware(base) if base else None
        )
        profile = dataclasses.replace(profile, name=name or profile.name)
    else:
        measurements, device = _read_run(source)
        profile = fit_profile(
            measurements,
            base=load_hardware(base or DEFAULT_HARDWARE),
            name=name or "measured",
            title=f"fitted to {len(measurements)} measurements on {device}",
        )
    text = format_profile(profile, header=f"Written by `moejax fit` from {source.name}.")
    if out is not None:
        write_text(out, text)
        say(f"wrote {out}")
    if out is None and output is None:
        print(text, end="")
    else:
        columns = ("name", "value", "standard_error", "unit", "kind")
        emit(_constants(profile), output or OutputFormat.table, columns=columns)


def _read_links(source: Path) -> dict[str, Any] | None:
    """Arguments of `fit_devices` from a run over several devices; None of another run."""
    path, results = _read_results(source)
    engine = results.get("engine") if isinstance(results, dict) else None
    if not isinstance(engine, dict):
        return None
    try:
        found = {int(n): one["links"] for n, one in engine["rates"].items() if "links" in one}
        if len(found) != 1:
            raise BadFileError(
                f"{path} holds the links of {' and '.join(map(str, found)) or 'no'} devices",
                "A profile is of one number: run scripts/bench_devices.py --devices 1,2, say.",
            )
        ((num_devices, links),) = found.items()
        return {
            "num_devices": num_devices,
            "all_reduce_s": {
                int(one["all_reduce_bytes"]): statistics.median(one["all_reduce_s"]["samples"])
                for one in links["all_reduces"]
            },
            "alone_bytes_per_s": float(links["alone_bytes_per_s"]),
            "beside_bytes_per_s": float(links["beside_bytes_per_s"]),
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadFileError(
            f"{path}: the links of its devices are incomplete: {error!r}",
            "Run scripts/bench_devices.py again.",
        ) from error


def _read_engine_run(source: Path) -> dict[str, Any] | None:
    """A run with steps of an engine; None of another run."""
    results = _read_results(source)[1]
    if not isinstance(results, dict) or not isinstance(results.get("engine"), list):
        return None
    _read_run(source)
    return results


def _read_results(source: Path) -> tuple[Path, Any]:
    from moejax.results import read_json

    path = source / _RUN_FILE if source.is_dir() else source
    return path, read_json(path)


def _read_run(source: Path) -> tuple[list[dict[str, Any]], str]:
    path, results = _read_results(source)
    measured = results.get("measured") if isinstance(results, dict) else None
    groups = [measured.get(kind) for kind in _KINDS] if isinstance(measured, dict) else []
    lists = [group for group in groups if isinstance(group, list)]
    if len(lists) < len(_KINDS) or not any(lists):
        raise BadFileError(
            f"{path} holds no measurements of a machine",
            "Run `moejax bench` without --no-measure, or give a CSV file.",
        )
    records = [record for group in lists for record in group]
    if not all(isinstance(record, dict) for record in records):
        raise BadFileError(f"{path}: a measurement is not an object", "Run `moejax bench` again.")
    environment = results.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else None
    return records, str(device or "an unnamed device")


def _constants(profile: "Hardware") -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "value": constant.value,
            "standard_error": constant.standard_error,
            "unit": constant.unit,
            "kind": constant.kind,
            "source": constant.source,
        }
        for name, constant in profile.constants.items()
    ]


def _say_evidence(found: "CsvFit") -> None:
    rows = found.copy.rows
    say(f"fitted {len(rows)} copy sizes of {found.gpu} on {found.rig} ({found.time_domain} times)")
    held_out = sorted(found.copy.held_out_error_ratios)
    if held_out:
        say(
            f"held-out sizes: median error {format_ratio(held_out[len(held_out) // 2])}, "
            f"largest {format_ratio(held_out[-1])}"
        )
    for check in found.checks:
        size = format_bytes(check.row.num_bytes) if check.row.num_bytes else "large"
        say(
            f"outside check, {size} on {check.row.rig} ({check.row.time_domain} times): "
            f"{format_bytes(check.row.bytes_per_s)}/s quoted, "
            f"{format_bytes(check.predicted_bytes_per_s)}/s predicted "
            f"({format_change(check.error_ratio)})"
        )
