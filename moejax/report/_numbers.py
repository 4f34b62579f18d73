"""Numbers as the report writes them: three significant digits and a unit."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from moejax.units import format_bytes, format_seconds

from ._summary import Estimate

NOTHING = "\N{EN DASH}"
"""Stands for a value that this run does not have."""


def format_count(value: float) -> str:
    """Three significant digits: `2.48`, `16.0`, `1,440`."""
    if not math.isfinite(value):
        return NOTHING
    if abs(float(f"{value:.3g}")) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def format_factor(value: float) -> str:
    """A ratio of two amounts: `2.48×`."""
    return f"{format_count(value)}\N{MULTIPLICATION SIGN}" if math.isfinite(value) else NOTHING


def format_spread(value_s: float) -> str:
    """A standard deviation in seconds, or a dash where one run gives none."""
    return format_seconds(value_s) if math.isfinite(value_s) else NOTHING


def format_interval(one: Estimate, write: Callable[[float], str]) -> str:
    """Both ends of an interval: `12.1 ms to 12.5 ms`, or a dash where one run gives none."""
    return NOTHING if math.isnan(one.low) else f"{write(one.low)} to {write(one.high)}"


def format_with_interval(one: Estimate | None, write: Callable[[float], str]) -> str:
    """The mean, and its interval where there is one: `2.48× (2.41× to 2.55×)`."""
    if one is None or math.isnan(one.mean):
        return NOTHING
    ends = {write(one.low), write(one.high)} if not math.isnan(one.low) else set()
    # An interval that is too narrow to be seen in three digits says nothing.
    if ends <= {write(one.mean)}:
        return write(one.mean)
    return f"{write(one.mean)} ({format_interval(one, write)})"


def format_constant(value: float, unit: str) -> str:
    """A constant of a hardware profile with its unit."""
    writers: dict[str, Callable[[float], str]] = {
        "B": format_bytes,
        "s": format_seconds,
        "B/s": lambda amount: f"{format_bytes(amount)}/s",
        "FLOP/s": lambda amount: f"{format_count(amount / 1e12)} TFLOP/s",
        "1": format_count,
    }
    return writers[unit](value) if unit in writers else f"{format_count(value)} {unit}"


def format_field(value: Any) -> str:
    """A setting of a run, with all that it holds."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {format_field(item)}" for name, item in value.items())
    if isinstance(value, list):
        # Slots come as one number a layer; a long list of one value says it once.
        same = len(value) > 3 and all(item == value[0] for item in value)
        return f"{value[0]} ({len(value)} times)" if same else ", ".join(map(format_field, value))
    return format_count(value) if isinstance(value, float) else str(value)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Container[str] = ()
) -> str:
    """A table in GitHub's Markdown: numbers to the right, the first column and `words` left."""
    numbers = [name not in words for name in header[1:]]
    rules = ["---", *("---:" if is_number else "---" for is_number in numbers)]
    lines = [header, rules, *rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text that stays in its table cell."""
    return text.replace("|", "\\|").replace("\n", " ")
