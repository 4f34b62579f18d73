"""Decode speeds that others published: the rows, the rigs and the sizes of the files they ran."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from moejax.cards import Fields, ModelSpec, load_model, models_dir, read_card
from moejax.cost import read_csv
from moejax.errors import BadFileError

_FOLDER = models_dir() / "hardware" / "measurements"
_COLUMNS = (
    *("source", "file", "test", "hit_ratio", "misses", "context_tokens", "tokens_per_s"),
    *("not_stated", "assumption"),
)
MISSES = ("link", "host", "host layers")
"""Who serves a miss: a copy; the CPU beside the device; the CPU, which has whole layers."""


class Rig(NamedTuple):
    """A source of decode speeds, and what it states about its machine.

    Attributes:
      name: Key in decode.toml.
      title: The source in a few words.
      profile: Hardware profile of its card.
      rig: Cards, processor and memory.
      host_read_bytes_per_s: Stated rate at which the CPU reads its memory.
      engine: What ran.
      source: Where it was published.
      stated_law: Intercept and slope in seconds of step time against miss ratio, as the source
        gives them; None where it gives none.
      explained: Why the predictions miss the target; empty where they meet it.
    """

    name: str
    title: str
    profile: str
    rig: str
    host_read_bytes_per_s: float
    engine: str
    source: str
    stated_law: tuple[float, float] | None
    explained: str


class StoredModel(NamedTuple):
    """A file of weights: its model, sized as the file is, and where the sizes were read."""

    spec: ModelSpec
    source: str


class PublishedStep(NamedTuple):
    """One published decode speed.

    Attributes:
      rig: The source.
      stored: What ran; None where the sizes are not known, and then nothing is predicted.
      test: The source's name of the run.
      hit_ratio: Share of demanded experts on the device; None where it is not stated.
      misses: One of `MISSES`.
      context_tokens: Mean context; None where nothing is predicted.
      step_s: Seconds a token.
      not_stated: What a prediction would need and the source does not state.
      assumption: What the prediction takes for granted.
    """

    rig: Rig
    stored: StoredModel | None
    test: str
    hit_ratio: float | None
    misses: str
    context_tokens: int | None
    step_s: float
    not_stated: str
    assumption: str


def read_decode(folder: Path = _FOLDER) -> tuple[PublishedStep, ...]:
    """Reads decode.csv and decode.toml of a folder.

    Raises:
      BadFileError: A file is missing or unreadable, a row names a source or file that is not
        described, a number is out of range, or a row that can be predicted lacks what that needs.
    """
    card_path, csv_path = folder / "decode.toml", folder / "decode.csv"
    card = read_card(card_path)
    rigs = {name: _rig(name, table, card_path) for name, table in _tables(card, "sources")}
    stored = {name: _stored(table, card_path, name) for name, table in _tables(card, "files")}
    steps = []
    for line, fields in read_csv(csv_path, _COLUMNS):
        where = f"{csv_path}, line {line}"
        if fields["source"] not in rigs or fields["file"] not in {"", *stored}:
            raise BadFileError(
                f"{where}: {fields['source']!r} or {fields['file']!r} is not described",
                f"Describe it in {card_path}.",
            )
        if fields["misses"] not in MISSES:
            raise BadFileError(
                f"{where}: misses = {fields['misses']!r} is not known",
                f"Known: {', '.join(MISSES)}.",
            )
        hit_ratio = _number(fields, "hit_ratio", where, most=1.0)
        context = _number(fields, "context_tokens", where)
        speed = _number(fields, "tokens_per_s", where)
        is_complete = bool(fields["file"]) and None not in (hit_ratio, context)
        if speed is None or is_complete == bool(fields["not_stated"]):
            raise BadFileError(
                f"{where}: either all that a prediction needs is stated, or not_stated says what "
                "is missing",
                "Fill file, hit_ratio, context_tokens and tokens_per_s, or not_stated.",
            )
        steps.append(
            PublishedStep(
                rig=rigs[fields["source"]],
                stored=stored.get(fields["file"]),
                test=fields["test"],
                hit_ratio=hit_ratio,
                misses=fields["misses"],
                context_tokens=None if context is None else int(context),
                step_s=1.0 / speed,
                not_stated=fields["not_stated"],
                assumption=fields["assumption"],
            )
        )
    return tuple(steps)


def _tables(card: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    return list(card.get(name, {}).items())


def _rig(name: str, table: dict[str, Any], path: Path) -> Rig:
    fields = Fields(table, f"{path}: sources.{name}")
    law = None
    if fields.has("stated_slope_s"):
        law = (fields.number("stated_intercept_s"), fields.number("stated_slope_s"))
    texts = {key: fields.text(key) for key in ("title", "profile", "rig", "engine", "source")}
    texts["explained"] = fields.text("explained", "")
    rate = fields.number("host_read_bytes_per_s")
    return Rig(name=name, host_read_bytes_per_s=rate, stated_law=law, **texts)


def _stored(table: dict[str, Any], path: Path, name: str) -> StoredModel:
    fields = Fields(table, f"{path}: files.{name}")
    model = load_model(fields.text("model"))
    # A step reads a row of the embedding and all of the rest.
    num_read = model.dense_params - model.vocab_size * model.hidden_size
    spec = dataclasses.replace(
        model,
        expert_bytes=round(
            fields.number("routed_bytes") / (model.num_moe_layers * model.num_experts)
        ),
        dense_bits=8 * fields.number("device_bytes") / num_read,
    )
    return StoredModel(spec, fields.text("source"))


def _number(
    fields: dict[str, str], name: str, where: str, most: float = float("inf")
) -> float | None:
    if not (text := fields[name]):
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= most:
        raise BadFileError(
            f"{where}: {name} = {text!r} is out of range",
            "Correct it, or leave it empty where it is not stated.",
        )
    return value
