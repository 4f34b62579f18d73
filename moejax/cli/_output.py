"""Results on stdout, as a table for people or as JSON, JSON lines, CSV or Markdown."""

import csv
import enum
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from moejax.errors import MoejaxError
from moejax.units import format_bytes, format_ratio, format_seconds

Record = Mapping[str, Any]

# The first ending that fits says how people read the number.
_UNITS: Mapping[str, Callable[[float], str]] = {
    "_bytes_per_s": lambda value: f"{format_bytes(value)}/s",
    "_per_s": lambda value: f"{value:.3g}",
    "_bytes": format_bytes,
    "_ratio": format_ratio,
    "_ratio_warm": format_ratio,
    "_s": format_seconds,
}


class OutputFormat(enum.StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    md = "md"


def emit(
    records: Sequence[Record] | Record,
    output: OutputFormat,
    *,
    columns: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Prints one record or a list of them to stdout.

    Tables and Markdown show numbers with a unit (read from the end of the key) and three
    significant digits; the other formats keep full precision, and a number that is not finite
    becomes null there.

    Args:
      records: What to print. One record is shown as a list of its fields, and as one object in
        JSON.
      output: The format.
      columns: Keys that a table or Markdown shows, in this order; None shows all. The formats for
        programs always have everything.
      title: Heading of a table or Markdown; other formats leave it out.
    """
    from moejax.results import to_plain

    plain = to_plain(records)
    if output is OutputFormat.json:
        print(json.dumps(plain, indent=2, allow_nan=False))
        return
    rows: list[dict[str, Any]] = plain if isinstance(plain, list) else [plain]
    if output is OutputFormat.jsonl:
        for row in rows:
            print(json.dumps(row, allow_nan=False))
        return
    if output is OutputFormat.csv:
        _print_csv(rows, _keys(rows))
        return
    keys = list(columns) if columns is not None else _keys(rows)
    if isinstance(plain, dict):
        headings, is_text = ["field", "value"], [True, True]
        cells = [[_heading(key), _show(key, plain.get(key))] for key in keys]
    else:
        headings = [_heading(key) for key in keys]
        is_text = [_is_text([row.get(key) for row in rows]) for key in keys]
        cells = [[_show(key, row.get(key)) for key in keys] for row in rows]
    print_grid = _print_markdown if output is OutputFormat.md else _print_table
    print_grid(headings, cells, is_text, title)


def print_failure(failure: MoejaxError) -> None:
    """Says on stderr what went wrong and what helps."""
    is_coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    error = typer.style("error", fg="red", bold=True) if is_coloured else "error"
    hint = typer.style("hint", fg="cyan", bold=True) if is_coloured else "hint"
    print(f"{error}: {failure.cause}", file=sys.stderr)
    if failure.hint:
        print(f"\n{hint}: {failure.hint}", file=sys.stderr)


def _keys(rows: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _print_csv(rows: Sequence[Record], keys: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        cells = (row.get(key) for key in keys)
        writer.writerow(
            json.dumps(cell, allow_nan=False) if isinstance(cell, list | dict | bool) else cell
            for cell in cells
        )


def _print_markdown(
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    is_text: Sequence[bool],
    title: str,
) -> None:
    if title:
        print(f"**{title}**\n")
    rules = ["---" if text else "---:" for text in is_text]
    for row in [headings, rules, *cells]:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")


def _print_table(
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    is_text: Sequence[bool],
    title: str,
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for heading, text in zip(headings, is_text, strict=True):
        table.add_column(Text(heading), justify="left" if text else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    # Into a pipe or a file goes every cell whole, whatever the width of the terminal.
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(table)


def _heading(key: str) -> str:
    key = key.replace("_ratio_warm", "_warm")
    ending = next((unit for unit in _UNITS if key.endswith(unit)), "")
    words = key.removesuffix(ending).removeprefix("num_").replace("_", " ")
    return f"{words}/s" if ending == "_per_s" else words


def _show(key: str, value: Any) -> str:
    if value is None or value in ([], ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_show(key, item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(name, item)}" for name, item in value.items())
    if isinstance(value, int | float):
        return _show_number(key, value)
    return str(value)


def _show_number(key: str, value: float) -> str:
    for unit, show in _UNITS.items():
        if key.endswith(unit):
            return show(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _is_text(column: Sequence[Any]) -> bool:
    """Whether a column stands to the left: anything but numbers, gaps aside."""
    values = [value for value in column if value is not None]
    return not values or not all(type(value) in (int, float) for value in values)
