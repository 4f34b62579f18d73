"""Where the cards lie and how a card file becomes a plain dict."""

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moejax.errors import BadFileError, UsageError

# The largest card is a few kilobytes; a config.json with a vocabulary inside stays below this.
_MAX_CARD_BYTES = 16 * 2**20
_HINT = "A card is TOML, a config.json is JSON, both in UTF-8 and a table of fields."


def models_dir() -> Path:
    """The folder of the cards: `models/` of a checkout, `moejax/_models` inside a wheel."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_models"
    return shipped if shipped.is_dir() else package.parent / "models"


def read_card(path: Path) -> dict[str, Any]:
    """Reads a TOML or JSON file whose top level is a table.

    Raises:
      BadFileError: The file is missing, unreadable, no TOML or JSON, or not a table.
    """
    try:
        # A pipe or a device would block or never end, hence the question before opening.
        if not path.is_file():
            raise BadFileError(f"{path} is not a file", "Give the path of a card or config.json.")
        if path.stat().st_size > _MAX_CARD_BYTES:
            raise BadFileError(
                f"{path} has {path.stat().st_size} bytes: too large for a card", _HINT
            )
        text = path.read_text(encoding="utf-8")
        fields = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BadFileError(
            f"{path} cannot be read: {first_line(error)}",
            _HINT,
        ) from error
    if not isinstance(fields, dict):
        raise BadFileError(f"{path} holds a {type(fields).__name__}, not a table of fields", _HINT)
    return fields


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str) -> UsageError:
    """The error for a name that is no card, with the closest names there are."""
    known = tuple(known)
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    meant = f"Did you mean {' or '.join(close)}? " if close else f"Known: {', '.join(known)}. "
    return UsageError(f"unknown {kind} {name!r}", meant + hint)


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _card_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


MODELS = _card_names(models_dir())
"""Names of the model cards."""

HARDWARE = _card_names(models_dir() / "hardware")
"""Names of the hardware profiles."""
