"""Traces that come with moejax: routing recorded on our own small models."""

from pathlib import Path

from moejax.cards import models_dir, read_card
from moejax.errors import BadFileError


def find_trace(name_or_path: str | Path) -> Path:
    """The file of a trace: a shipped one by its name, any other by its path.

    The text `./small-moe` names a file even though `small-moe` names a shipped trace.

    Raises:
      BadFileError: It looks like a name, but no trace has it, nor has a file.
    """
    name = str(name_or_path)
    if name in TRACES:
        return _folder() / f"{name}.safetensors"
    path = Path(name_or_path)
    if path.name == name and not path.suffix and not path.exists():
        raise BadFileError(
            f"{name!r} is neither a file nor a trace that comes with moejax",
            f"Those are {' and '.join(TRACES)}. Any other trace is named by its file, "
            "which ends in .safetensors.",
        )
    return path


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
