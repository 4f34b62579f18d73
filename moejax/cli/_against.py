"""`moejax validate --against`: a profile and the timeline beside an engine's measured steps."""

from pathlib import Path
from typing import Any

from moejax.errors import BadFileError, MoejaxError, UsageError
from moejax.units import format_ratio

from ._output import OutputFormat, emit
from ._progress import say, show_progress

_PROFILE_FILE = "this-machine.toml"
_COLUMNS = (
    *("strategy", "slots", "scope", "batch_size", "routing", "is_held_out", "predicted_s"),
    *("interval_s", "simulated_s", "measured_s", "error_ratio", "counts_equal"),
)
_LAWS = {
    "predicted": "closed form",
    "simulated": "timeline",
    "roofline": "baseline: datasheet roofline",
    "two_constants": "baseline: memory and link rates only",
}


def validate_against(
    path: Path, hardware: str, out: Path | None, output: OutputFormat, seed: int
) -> None:
    """Prints the ladder of an engine's run, and stores it with the run where `out` says.

    Raises:
      BadFileError: The file is no run of the engine, or the profile is unusable.
      UsageError: No profile is given and none lies beside the run.
      MoejaxError: The counts of a case differ from the simulator's.
    """
    from moejax.bench import ladder, summarise_ladder
    from moejax.cards import load_hardware
    from moejax.results import write_json

    results = read_engine_run(path)
    profile = load_hardware(hardware or _beside(path))
    with show_progress("simulating") as progress:
        rows = ladder(results, profile, seed=seed, progress=progress)
    summary = summarise_ladder(rows)
    emit(rows, output, columns=_COLUMNS, title=f"{results['model']['name']}, {profile.title}")
    _say_summary(summary, has_intervals=profile.uncertainty is not None)
    if out is not None:
        write_json(out, {**results, "ladder": rows, "ladder_summary": summary})
        say(f"wrote {out}")
    num_differ = summary["num_counted"] - summary["num_counts_equal"]
    if num_differ:
        raise MoejaxError(
            f"the counts of {num_differ} of {summary['num_counted']} cases differ from the "
            "simulator's",
            "`counts_equal` of `-o json` says which; measure them again with this version.",
        )


def read_engine_run(path: Path) -> dict[str, Any]:
    """What `moejax bench --engine` or scripts/bench_engine.py measured.

    Raises:
      BadFileError: The file is something else, or holds no case.
    """
    from moejax.bench import ENGINE_SCHEMA
    from moejax.results import read_json

    results = read_json(path / "results.json" if path.is_dir() else path)
    if not isinstance(results, dict) or results.get("schema") != ENGINE_SCHEMA:
        raise BadFileError(
            f"{path} is no run of an engine", "Make one with `moejax bench --engine`."
        )
    if not results.get("engine"):
        raise BadFileError(f"{path} holds no case", "Measure some with `moejax bench --engine`.")
    return results


def _beside(path: Path) -> str:
    found = (path if path.is_dir() else path.parent) / _PROFILE_FILE
    if not found.exists():
        raise UsageError(
            f"no {_PROFILE_FILE} lies beside {path}", "Name a profile with --hardware."
        )
    return str(found)


def _say_summary(summary: dict[str, Any], *, has_intervals: bool) -> None:
    num_cases = summary["num_cases"]
    if not num_cases:
        say("the fit saw every case: nothing is held out, so no error is told")
        return
    say(f"{num_cases} cases that the fit did not see:")
    for name, label in _LAWS.items():
        if (errors := summary["errors"][name]) is not None:
            median, worst = (format_ratio(errors[key]) for key in ("median_ratio", "worst_ratio"))
            say(f"{label}: median error {median}, worst {worst}")
    if has_intervals:
        say(f"90 % intervals hold {format_ratio(summary['coverage_ratio'])} of them")
    else:
        say("the profile does not say how sure it is: there are no intervals")
