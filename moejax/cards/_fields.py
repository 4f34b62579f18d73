"""Typed look-ups in a configuration; every complaint names the field and the file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moejax.errors import BadFileError

# Far above any model and far below what would overflow a 64-bit product of three widths.
_MAX_COUNT = 2**24
_MAX_NUMBER = 3.4e38  # what float32 holds
CONFIG_HINT = "Compare the file with the config.json that the model was published with."


@dataclass(frozen=True)
class Fields:
    """The fields of a `config.json` or of a card's `[config]` table.

    Attributes:
      values: The fields as read.
      where: What error messages call the file.
    """

    values: Mapping[str, Any]
    where: str

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def count(self, *spellings: str, least: int = 1) -> int:
        """A whole number of at least `least`, under the first spelling that is present.

        Raises:
          BadFileError: No spelling is present, or the value is no whole number in range.
        """
        name = next((spelling for spelling in spellings if self.has(spelling)), None)
        if name is None:
            raise self._missing(spellings)
        return self._checked(name, self.values[name], least)

    def agreed_count(self, *spellings: str) -> int:
        """As `count`, but spellings that contradict each other are an error too."""
        first = self.count(*spellings)
        for name in spellings:
            if self.has(name) and self.values[name] != first:
                raise BadFileError(
                    f"{self.where}: {name} = {self.values[name]!r} is not {first}", CONFIG_HINT
                )
        return first

    def counts(self, name: str) -> list[int]:
        """A list of whole numbers; empty where the field is absent."""
        values = self.values.get(name) or []
        if not isinstance(values, list):
            raise BadFileError(f"{self.where}: {name} = {values!r} is not a list", CONFIG_HINT)
        return [self._checked(name, value, least=0) for value in values]

    def flag(self, name: str) -> bool:
        """A boolean that must be stated.

        Raises:
          BadFileError: The field is missing or not a boolean.
        """
        if not self.has(name):
            raise self._missing((name,))
        if not isinstance(self.values[name], bool):
            raise BadFileError(
                f"{self.where}: {name} = {self.values[name]!r} is not true or false", CONFIG_HINT
            )
        return self.values[name]

    def number(self, name: str) -> float:
        """A number above zero, within float32, that must be stated.

        Raises:
          BadFileError: The field is missing or no such number.
        """
        if not self.has(name):
            raise self._missing((name,))
        value = self.values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < _MAX_NUMBER:
            raise BadFileError(
                f"{self.where}: {name} = {value!r} is not a number above 0", CONFIG_HINT
            )
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A text; missing is an error unless there is a default."""
        if not self.has(name):
            if default is None:
                raise self._missing((name,))
            return default
        if not isinstance(self.values[name], str):
            raise BadFileError(
                f"{self.where}: {name} = {self.values[name]!r} is not a text", CONFIG_HINT
            )
        return self.values[name]

    def _checked(self, name: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadFileError(
                f"{self.where}: {name} = {value!r} is not a whole number", CONFIG_HINT
            )
        if not least <= value <= _MAX_COUNT:
            raise BadFileError(
                f"{self.where}: {name} = {value} is not in {least}..{_MAX_COUNT}", CONFIG_HINT
            )
        return value

    def _missing(self, spellings: tuple[str, ...]) -> BadFileError:
        also = f" (or {', '.join(spellings[1:])})" if spellings[1:] else ""
        return BadFileError(
            f"{self.where} lacks {spellings[0]!r}{also}",
            "moejax sizes nothing from class defaults: add the field.",
        )
