"""`moejax validate --hardware`: a profile beside measurements of its card that no fit saw."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moejax.errors import UsageError
from moejax.units import format_ratio, format_seconds

from ._output import OutputFormat, emit
from ._progress import say, show_progress

_STEPS = ("test", "hit_ratio", "published_s", "predicted_s", "error_ratio", "remark")
_SOURCES = (
    *("source", "num_rows", "num_predicted", "median_error_ratio", "worst_error_ratio"),
    *("published_intercept_s", "predicted_intercept_s", "published_slope_s", "predicted_slope_s"),
)
_RATES = ("quantity", "gpu", "size", "published", "predicted", "error_ratio", "source")
_OWN = (
    *("run", "quantity", "batch_size", "num_rows", "median_error_ratio", "worst_error_ratio"),
    "bias_ratio",
)
_STEP = "step"


class HardwareFigure(NamedTuple):
    """A median error, its target, why it is missed where it is, and its source."""

    label: str
    error_ratio: float
    target_ratio: float
    explained: str
    source: str


def validate_hardware(profile: str, output: OutputFormat) -> None:
    """Prints every measurement of a profile's card that no fit saw, with our prediction.

    Raises:
      UsageError: There is no such profile, or no such measurement of its card.
      BadFileError: A table of measurements is unreadable.
    """
    from moejax.bench.outside import compare_profile

    with show_progress("predicting") as progress:
        progress(0, 1, profile)
        found = compare_profile(profile)
    if not any(found[part] for part in ("decode", "rates", "own")):
        from moejax.cards import HARDWARE

        raise UsageError(
            f"there is no measurement of {profile} beside those it was made from",
            f"Name one of {', '.join(HARDWARE)}.",
        )
    if output is OutputFormat.json:
        emit(found, output)
    elif output in (OutputFormat.csv, OutputFormat.jsonl):
        emit(_flat(found), output)
    else:
        _emit_tables(found, output)
    _say_summary(found)


def hardware_figures() -> Iterator[HardwareFigure]:
    """The median errors that `moejax validate` checks: of published decode steps, of our runs."""
    from moejax.bench.outside import OWN_RUNS, TARGET_RATIO, compare_profile

    for profile in ("rtx-3090", *OWN_RUNS):
        found = compare_profile(profile)
        for one in found["decode_sources"]:
            if (error := one["median_error_ratio"]) is not None:
                label = f"{profile}: median error of {one['num_predicted']} published decode steps"
                yield HardwareFigure(
                    label, error, TARGET_RATIO, one["explained"], f"{one['source']}, decode.csv"
                )
        for one in found["own_runs"]:
            if one["quantity"] == _STEP:
                many = f"{one['num_rows']} measured steps, batch {one['batch_size']}"
                yield HardwareFigure(
                    f"{profile}: median error of {many}",
                    one["median_error_ratio"],
                    TARGET_RATIO,
                    "",
                    f"reports/{one['run']}",
                )


def _emit_tables(found: Mapping[str, Any], output: OutputFormat) -> None:
    profile = found["profile"]
    for one in found["decode_sources"]:
        rows = [row for row in found["decode"] if row["source"] == one["source"]]
        emit(rows, output, columns=_STEPS, title=f"{one['source']}, on {profile}")
    tables = {**found, "rates": [{**row, **_shown(row)} for row in found["rates"]]}
    for part, columns, title in (
        ("decode_sources", _SOURCES, "published decode steps, by source"),
        ("rates", _RATES, f"published rates that {profile} was not made from"),
        ("own_runs", _OWN, f"our own runs of the engine, predicted with {profile}"),
    ):
        if tables[part]:
            emit(tables[part], output, columns=columns, title=title)


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A published rate and ours as people read them."""
    unit, scale = ("TFLOP/s", 1e12) if row["quantity"] == "compute" else ("GB/s", 1e9)
    return {
        name: f"{row[f'{name}_per_s'] / scale:.4g} {unit}" for name in ("published", "predicted")
    }


def _flat(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record a measurement, of all kinds alike."""
    flat = []
    for row in found["decode"]:
        where = {"source": row["source"], "what": row["test"], "remark": row["remark"]}
        numbers = (row["published_s"], row["predicted_s"], row["error_ratio"])
        flat.append(_flat_row("decode", _STEP, where, numbers))
    for row in found["rates"]:
        what = " ".join(filter(None, (row["gpu"], row["size"])))
        where = {"source": row["source"], "what": what, "remark": row["note"]}
        numbers = (row["published_per_s"], row["predicted_per_s"], row["error_ratio"])
        flat.append(_flat_row("rate", row["quantity"], where, numbers))
    for row in found["own"]:
        where = {"source": f"reports/{row['run']}", "what": row["what"], "remark": ""}
        numbers = (row["measured"], row["predicted"], row["error_ratio"])
        flat.append(_flat_row("own", row["quantity"], where, numbers))
    return flat


def _flat_row(
    kind: str, quantity: str, where: Mapping[str, str], numbers: Sequence[float | None]
) -> dict[str, Any]:
    names = ("measured", "predicted", "error_ratio")
    return {
        "kind": kind,
        "quantity": quantity,
        **where,
        **dict(zip(names, numbers, strict=True)),
    }


def _say_summary(found: Mapping[str, Any]) -> None:
    for one in found["decode_sources"]:
        if one["median_error_ratio"] is None:
            continue
        many = f"{one['num_predicted']} of {one['num_rows']} steps"
        say(f"{one['source']}: median error {format_ratio(one['median_error_ratio'])}, {many}")
        if one["explained"]:
            say(f"  misses the target: {one['explained']}")
        if one["published_slope_s"] is not None:
            law = "{} + {} x miss ratio".format
            theirs = law(*(format_seconds(one[f"published_{name}_s"]) for name in _LAW))
            ours = law(*(format_seconds(one[f"predicted_{name}_s"]) for name in _LAW))
            say(f"  published {theirs}; predicted {ours}")


_LAW = ("intercept", "slope")
