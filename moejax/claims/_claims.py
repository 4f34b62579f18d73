"""Reading the claims: every figure by a stable path."""

import functools
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

NOT_CLAIMED = ("title", "note", "model", "design", "figures", "future_work", "known_conflicts")
"""Sections that set the scene, or that were added by the auditors: nothing to compare."""

STRATEGIES_OF_STUDY = ("on_demand", "oracle", "multi_look", "top_k", "intelligent")
"""Its A to E, by the names that they have here."""

_NAMES = ("id", "label")


class Claim(NamedTuple):
    """One figure, or one statement where the study gives no number.

    Attributes:
      path: Where it stands: `hit_rate_percent.oracle.mean`; columns by name, lists by index.
      value: What is claimed.
    """

    path: str
    value: float | str


@functools.cache
def load_claims() -> Mapping[str, Any]:
    """The figures that the reference study claims; they are audited, never used as results."""
    text = resources.files("moejax.claims").joinpath("claims.json").read_text(encoding="utf-8")
    return json.loads(text)


def list_claims(claims: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Every claim in the order of the file; a cell that is left empty claims nothing."""
    found = []
    for section, content in claims.items():
        if section not in NOT_CLAIMED:
            found += _walk(section, content)
    return tuple(found)


def table(claims: Mapping[str, Any], section: str, column: str) -> dict[str, float]:
    """One column of a section's table by row; rows without the figure are left out."""
    content = claims[section]
    index = content["columns"].index(column)
    rows = {name: row[index] for name, row in content.items() if name != "columns"}
    return {name: value for name, value in rows.items() if value is not None}


def _walk(path: str, content: Any, columns: tuple[str, ...] = ()) -> Iterator[Claim]:
    if isinstance(content, Mapping):
        names = tuple(content.get("columns", ()))
        for key, inner in content.items():
            if key != "columns" and key not in _NAMES:
                yield from _walk(f"{path}.{key}", inner, names)
    elif isinstance(content, list):
        keys = columns or tuple(map(str, range(len(content))))
        for key, inner in zip(keys, content, strict=True):
            yield from _walk(f"{path}.{key}", inner)
    elif content is not None:
        yield Claim(path, content)
