"""`moejax report --compare A B`: two runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UsageError

from ._output import OutputFormat, emit
from ._progress import say

if TYPE_CHECKING:
    from moejax.report import Compared, Comparison

_COLUMNS = (
    *("strategy", "batch_size", "dispatch", "a_s", "a_interval_s", "b_s", "b_interval_s"),
    *("b_over_a", "b_over_a_interval", "a_hit_ratio", "b_hit_ratio", "verdict"),
)
_PEOPLE = (OutputFormat.table, OutputFormat.md)


def show_comparison(a: Path, b: Path, out: Path | None, output: OutputFormat) -> None:
    """Prints two runs side by side, and writes the whole of it where `out` says.

    Raises:
      UsageError: The runs have nothing in common, or `out` is no .json.
      BadFileError: One of them is no bench run.
    """
    from moejax.report import compare, read_run
    from moejax.results import write_json

    if out is not None and out.suffix != ".json":
        raise UsageError(f"--out {out} is not a .json file", "Name it like comparison.json.")
    found = compare(read_run(_folder(a)), read_run(_folder(b)))
    rows = [_row(one) for one in found.rows]
    whole = {
        "a": str(a),
        "b": str(b),
        "is_paired": found.is_paired,
        "differences": found.differences,
        "rows": rows,
    }
    if output in _PEOPLE and found.differences:
        shown = [
            {"field": one.field, "a": _shown(one.a), "b": _shown(one.b)}
            for one in found.differences
        ]
        emit(shown, output, title="What differs")
        print()
    if output is OutputFormat.json:
        emit(whole, output)
    else:
        emit(rows, output, columns=_COLUMNS, title=f"A: {a}; B: {b}; mean step latency")
    _say_what_it_rests_on(found)
    if out is not None:
        write_json(out, whole)
        say(f"wrote {out}")


def _folder(path: Path) -> Path:
    """A run is named by its folder or by the results in it."""
    return path.parent if path.name == "results.json" and path.is_file() else path


def _shown(value: Any) -> str | None:
    from moejax.report import format_field

    return None if value is None else format_field(value)


def _row(one: "Compared") -> dict[str, Any]:
    return {
        **one.key._asdict(),
        "a_s": one.a.mean,
        "a_interval_s": [one.a.low, one.a.high],
        "b_s": one.b.mean,
        "b_interval_s": [one.b.low, one.b.high],
        "b_over_a": one.b_over_a.mean,
        "b_over_a_interval": [one.b_over_a.low, one.b_over_a.high],
        "a_hit_ratio": one.a_hit_ratio,
        "b_hit_ratio": one.b_hit_ratio,
        "verdict": one.verdict,
    }


def _say_what_it_rests_on(found: "Comparison") -> None:
    draws = "the same requests, draw by draw" if found.is_paired else "other requests in each"
    say(f"95 % bootstrap intervals over draws of requests; {draws}; b over a is of step times")
    for name, number in (("A", found.num_only_a), ("B", found.num_only_b)):
        if number:
            say(f"only {name} has {number} more combinations of strategy, batch size and dispatch")
    if not found.differences:
        say("nothing differs in model, machine, routing, settings and versions")
