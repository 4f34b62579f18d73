"""Traces that come with moejax: routing recorded on our own small models."""

from pathlib import Path

from moejax.cards import models_dir, read_card


def find_trace(name_or_path: str | Path) -> Path:
    """The file of a trace: a shipped one by its name, any other by its path.

    `./small-moe` names a file even where `small-moe` names a shipped trace.
    """
    name = str(name_or_path)
    return _folder() / f"{name}.safetensors" if name in TRACES else Path(name_or_path)


def trace_note(name_or_path: str | Path) -> str:
    """What the card of a shipped trace says it is; nothing for other traces.

    Raises:
      BadFileError: The card cannot be read.
    """
    name = str(name_or_path)
    return str(read_card(_folder() / f"{name}.toml").get("note", "")) if name in TRACES else ""


def _folder() -> Path:
    return models_dir() / "traces"


TRACES = tuple(sorted(path.stem for path in _folder().glob("*.toml")))
"""Names of the traces that come with moejax."""
