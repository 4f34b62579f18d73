"""Where a number comes from: places in `results.json`, written as links and read back.

A place is a JSON pointer, `/grid/17`, whose last part may be a range of a list with both ends in
it, `/grid/10-19`; a semicolon joins several, as for a ratio of two means.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import quote

RESULTS_FILE = "results.json"
PLAN_FILE = "plan.json"

_RANGE = re.compile(r"(\d+)-(\d+)")
_TO_LEAVE = "/;-~"


class Found(NamedTuple):
    """One value of a place, and the JSON pointer of that value alone."""

    pointer: str
    value: Any


def place(pointers: Iterable[str]) -> str:
    """One place for all of these values: neighbours of a list as a range, the rest joined.

    Args:
      pointers: JSON pointers, each of one value.
    """
    parts = []
    numbered = [(*_split(pointer), index) for index, pointer in enumerate(pointers)]
    # Neighbours have the same difference between their number and their position here.
    for (parent, step), run in groupby(numbered, lambda one: (one[0], _step(one[1], one[2]))):
        names = [name for _, name, _ in run]
        if step is not None and len(names) > 1:
            names = [f"{names[0]}-{names[-1]}"]
        parts += [f"{parent}/{name}" for name in names]
    return ";".join(parts)


def pointer(*names: str | int) -> str:
    """The JSON pointer to a value by the names on the way to it (RFC 6901)."""
    return "".join(f"/{str(name).replace('~', '~0').replace('/', '~1')}" for name in names)


def link(text: str, *places: str, file: str = RESULTS_FILE) -> str:
    """Text that leads to places of a file beside the report, in Markdown."""
    return f"[{text}]({file}#{fragment(';'.join(places))})"


def fragment(place: str) -> str:
    """A place as the part of an address behind `#`."""
    return quote(place, safe=_TO_LEAVE)


def resolve(content: Any, place: str) -> tuple[Found, ...]:
    """All values of a place.

    Raises:
      LookupError: The content has no such place.
    """
    return tuple(found for part in place.split(";") for found in _resolve_part(content, part))


def _resolve_part(content: Any, part: str) -> list[Found]:
    parent, last = _split(part)
    holder = _value(content, parent)
    match = _RANGE.fullmatch(last) if isinstance(holder, list) else None
    names = [last] if match is None else map(str, range(int(match[1]), int(match[2]) + 1))
    return [Found(f"{parent}/{name}", _value(holder, f"/{name}")) for name in names]


def _value(content: Any, path: str) -> Any:
    for name in path.split("/")[1:]:
        if isinstance(content, Sequence) and not isinstance(content, str):
            if not name.isdecimal():
                raise LookupError(f"{name} is no item of a list")
            content = content[int(name)]
        elif isinstance(content, dict):
            content = content[name.replace("~1", "/").replace("~0", "~")]
        else:
            raise LookupError(f"nothing has a part {name}")
    return content


def _split(pointer: str) -> tuple[str, str]:
    parent, _, last = pointer.rpartition("/")
    return parent, last


def _step(name: str, index: int) -> int | None:
    return int(name) - index if name.isdecimal() else None
