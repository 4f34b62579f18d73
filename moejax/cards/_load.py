"""Finding a model: by card name, path, checkpoint folder or hub id."""

import re
from pathlib import Path

from moejax.errors import BadFileError, UsageError

from ._config import Stated, read_config
from ._fields import Fields
from ._places import MODELS, first_line, models_dir, read_card, unknown_name
from ._spec import ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No model has experts of a gigabyte, but Mixtral's exceed the bound of other counts.
_MAX_STATED = 2**40
_MAX_BITS = 64
_STATED = ("expert_bytes", "attention_params", "kv_values_per_token")
_CARD_KEYS = {"name", "hub_id", "source", "note", "config", "dense_bits", *_STATED}
_HINT = "A card, a config.json, a checkpoint folder or a hub id works too."


def load_model(name_or_path: str | Path, *, offline: bool = True) -> ModelSpec:
    """Loads a model's facts from wherever they are.

    Args:
      name_or_path: A card name, the path of a card or `config.json`, a checkpoint folder, or a
        hub id `Organisation/Name`. A hub id that a card carries is answered by the card; any
        other one is a path if a folder `Organisation` is there.
      offline: Never download. Otherwise only `config.json` is fetched.

    Raises:
      UsageError: The name is unknown, or a download would be needed and is not possible.
      BadFileError: The file is missing, corrupt, incomplete or contradicts itself.
    """
    text = str(name_or_path)
    if text in MODELS:
        return _read_model_card(models_dir() / f"{text}.toml")
    path = Path(text)
    if text.endswith((".toml", ".json")) or (text and path.exists()):
        return _read_path(path)
    if _HUB_ID.fullmatch(text):
        return _read_hub(text, offline)
    if "/" in text or text.startswith("."):
        raise _does_not_exist(text)
    raise unknown_name("model", text, MODELS, _HINT)


def _read_path(path: Path) -> ModelSpec:
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".toml":
        return _read_model_card(path)
    values = read_card(path)
    name = values.get("_name_or_path")
    if not isinstance(name, str) or not name:
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return read_config(Fields(values, str(path)), name=Path(name).name, source=f"{path}")


def _read_model_card(path: Path) -> ModelSpec:
    card = Fields(read_card(path), str(path))
    unknown = sorted(set(card.values) - _CARD_KEYS)
    if unknown:
        raise BadFileError(
            f"{path}: unknown field {unknown[0]!r}",
            f"A card has {', '.join(sorted(_CARD_KEYS))}; model fields go under [config].",
        )
    config = card.values.get("config")
    if not isinstance(config, dict):
        raise BadFileError(f"{path} has no [config] table", "Put the fields of config.json there.")
    return read_config(
        Fields(config, str(path)),
        name=card.text("name"),
        hub_id=card.text("hub_id", ""),
        source=card.text("source"),
        note=card.text("note", ""),
        stated=Stated(**{name: _stated(card, name) for name in _STATED}, dense_bits=_bits(card)),
    )


def _stated(card: Fields, name: str) -> int | None:
    value = card.values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_STATED:
        raise BadFileError(
            f"{card.where}: {name} = {value!r} is no sensible size",
            "State a whole number above 0; `expert_bytes` is that of one routed expert.",
        )
    return value


def _bits(card: Fields) -> float | None:
    if not card.has("dense_bits"):
        return None
    if (bits := card.number("dense_bits")) > _MAX_BITS:
        raise BadFileError(
            f"{card.where}: dense_bits = {bits} exceeds {_MAX_BITS}",
            "State the bits that a parameter outside the routed experts takes.",
        )
    return bits


def _read_hub(hub_id: str, offline: bool) -> ModelSpec:
    for name in MODELS:
        path = models_dir() / f"{name}.toml"
        if str(read_card(path).get("hub_id", "")).lower() == hub_id.lower():
            return _read_model_card(path)
    # A misspelt path beside files that are there looks like a hub id too.
    if Path(hub_id).parent.is_dir():
        raise _does_not_exist(hub_id)
    if offline:
        raise UsageError(
            f"{hub_id} has no card and downloads are off",
            "Allow downloads (leave out --offline), or give the path of its config.json.",
        )
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{hub_id} has no card and huggingface_hub is not installed",
            "Install moejax[hub], or give the path of its config.json.",
        ) from error
    try:
        path = Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # The hub raises dozens of types of several libraries.
        raise UsageError(
            f"{hub_id}: config.json could not be downloaded: {first_line(error)}",
            "Check the name and the connection, or give the path of its config.json.",
        ) from error
    fields = Fields(read_card(path), f"{hub_id} config.json")
    return read_config(
        fields, name=hub_id.split("/")[1], hub_id=hub_id, source=f"config.json of {hub_id}"
    )


def _does_not_exist(path: str) -> BadFileError:
    return BadFileError(f"{path} does not exist", f"Give a path that does. {_HINT}")
