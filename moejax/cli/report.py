"""`moejax report`: a bench run as a page with figures."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from moejax.errors import BadFileError, MoejaxError, UsageError

from ._compare import show_comparison
from ._options import OutputOption
from ._output import OutputFormat, emit
from ._progress import say, show_progress
from .bench import REPORTS, bench, new_folder

_RUN_FILE, _RUN_SCHEMA, _TEXT = "results.json", "moejax.bench/", "report.md"
_SHOWN = (
    *("batch_size", "strategy", "slots", "latency_s", "p99_s", "tokens_per_s", "hit_ratio"),
    *("memory_bytes", "ties", "num_left", "num_candidates"),
)


def report(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Run folder; default: the newest under reports/."),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            "--constraint",
            metavar="NAME=LIMIT",
            help="What a strategy must meet to be chosen: memory=500MB, complexity=4, "
            "latency=40ms, p99=60ms, hit=0.5, throughput=30, future=no; may be repeated.",
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price", metavar="CARD=USD", help="What a card costs, for money; may be repeated."
        ),
    ] = None,
    runs: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Set two runs side by side instead."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="Where --compare writes what it finds."),
    ] = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Write report.md, report.html and figures/ from a run's results.json.

    The HTML is the whole report in one file. Without DIR it takes the newest run under reports/,
    or runs the default bench first. With --constraint the report, and stdout, say which strategy
    to choose for every batch size. --compare sets the step latencies of two runs of a model side
    by side, chooses nothing and writes nothing but --out. Where DIR holds another report, written
    by a script, its report.md becomes report.html.

    Example: moejax report reports/first --constraint memory=2GB
    """
    from moejax.report import (
        load_data,
        parse_constraints,
        parse_prices,
        selection_rows,
        write_page,
        write_report,
    )

    if runs is not None:
        if folder is not None:
            raise UsageError(
                f"{folder} is a third run beside those of --compare", "Name two: --compare A B."
            )
        show_comparison(*runs, out, output)
        return
    if out is not None:
        raise UsageError("--out has no meaning without --compare", "A report lies beside its run.")
    constraints, prices_usd = parse_constraints(constraint or ()), parse_prices(price or ())
    if folder is None:
        folder = _newest_run()
    if folder is None:
        say(f"no run under {REPORTS}/ yet: running the default bench first")
        folder = new_folder()
        # The run's table is not this command's result.
        with contextlib.redirect_stdout(sys.stderr):
            bench(out=folder)
    elif not (folder / _RUN_FILE).is_file():
        raise BadFileError(
            f"{folder} holds no {_RUN_FILE}", "Make a run with `moejax bench --out DIR`."
        )
    elif _is_by_script(folder):
        if constraints or prices_usd:
            raise UsageError(
                f"{folder} is no run of strategies to choose from",
                "Leave --constraint and --price out, or name a run of `moejax bench`.",
            )
        emit({"page": str(write_page(folder))}, output)
        return
    with show_progress("drawing") as progress:
        page = write_report(
            folder, constraints=constraints, prices_usd=prices_usd, progress=progress
        )
    if not constraints:
        places = {
            "report": page,
            "page": page.with_suffix(".html"),
            "figures": folder / "figures",
        }
        emit({name: str(place) for name, place in places.items()}, output)
        return
    say(f"wrote {page} and {page.with_suffix('.html')}")
    rows = selection_rows(dataclasses.replace(load_data(folder), constraints=constraints))
    emit(rows, output, columns=_SHOWN)


def _newest_run() -> Path | None:
    """The bench run with the latest date; other reports keep their own results files."""
    from moejax.results import read_json

    dated = []
    for path in REPORTS.glob(f"*/{_RUN_FILE}"):
        try:
            if _schema(path).startswith(_RUN_SCHEMA):
                dated.append((read_json(path)["environment"]["date"], path.parent))
        except (MoejaxError, KeyError, TypeError):
            continue
    return max(dated, default=("", None))[1]


def _is_by_script(folder: Path) -> bool:
    """Whether a folder holds a report whose text comes from a script, not from here."""
    schema = _schema(folder / _RUN_FILE)
    is_other = schema.startswith("moejax.") and not schema.startswith(_RUN_SCHEMA)
    return is_other and (folder / _TEXT).is_file()


def _schema(path: Path) -> str:
    from moejax.results import read_json

    content = read_json(path)
    return str(content.get("schema", "")) if isinstance(content, dict) else ""
