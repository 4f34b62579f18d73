"""Reading untrusted JSON field by field, with an error that says where and how to cure it."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.errors import BadFileError


class Checker:
    """Reads fields of one file, and names file, field and cure when one is wrong."""

    def __init__(self, path: Path, hint: str) -> None:
        self._path = path
        self._hint = hint

    def fail(self, cause: str) -> BadFileError:
        """The error to raise for `cause`."""
        return BadFileError(f"{self._path}: {cause}", self._hint)

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        """`value` as an object with fields."""
        if not isinstance(value, Mapping):
            raise self.fail(f"{where} is {_shown(value)}, not an object")
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        """`value` as a list."""
        if not isinstance(value, list):
            raise self.fail(f"{where} is {_shown(value)}, not a list")
        return value

    def text(self, holder: Mapping[str, Any], field: str, where: str) -> str:
        """A field that holds a name."""
        value = holder.get(field)
        if not isinstance(value, str) or not value:
            raise self.fail(f"{where}.{field} is {_shown(value)}, not a name")
        return value

    def number(
        self,
        holder: Mapping[str, Any],
        field: str,
        where: str,
        *,
        highest: float = sys.float_info.max,
        is_positive: bool = False,
    ) -> float:
        """A field that holds a finite number from 0 to `highest`."""
        value = holder.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(f"{where}.{field} is {_shown(value)}, not a number")
        # Comparisons alone: NaN fails them, and an integer of any length passes through them.
        if not 0 <= value <= highest or (is_positive and value == 0):
            raise self.fail(f"{where}.{field} is {_shown(value)}, out of its range")
        return value

    def count(self, holder: Mapping[str, Any], field: str, where: str) -> int:
        """A field that holds a whole number."""
        value = self.number(holder, field, where)
        if value != int(value):
            raise self.fail(f"{where}.{field} is {_shown(value)}, not a whole number")
        return int(value)

    def numbers(self, holder: Mapping[str, Any], field: str, where: str) -> tuple[float, ...]:
        """A field that holds a list of finite numbers, none negative."""
        values = self.sequence(holder.get(field), f"{where}.{field}")
        items = {str(index): value for index, value in enumerate(values)}
        return tuple(self.number(items, index, f"{where}.{field}") for index in items)


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
