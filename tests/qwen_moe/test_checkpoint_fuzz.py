"""Damaged checkpoints: each is refused by an error of ours, or its weights are the original's.

Headers, index, configuration, lengths and non-finite data are damaged. What no reader can notice
without a hash is left out: a changed weight that stays finite, two tensors of one size whose
places are exchanged, and a 16-bit type declared as the other one.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moejax.errors import MoejaxError
from moejax.qwen_moe import abstract, params

from ._tiny_checkpoint import Weights, is_same, save_tiny, split_file, weights_of

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
SINGLE = "model.safetensors"
DEEP = b"[" * 100_000
HOSTILE = (
    *(0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, 1e308, True, None),
    *("", "3", "\0", [], [1], {}, {"x": 1}, [[]]),
)


class Damage(NamedTuple):
    """What to put in place of one file of the checkpoint."""

    what: str
    file: str
    content: bytes


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch):
    """Tracing the same model anew for each file would take most of the time."""
    monkeypatch.setattr(params, "abstract", cache(abstract))


@pytest.mark.parametrize("layout", params.LAYOUTS)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_damage_is_refused_or_does_no_harm(tmp_path, layout, kind):
    max_shard_bytes = 10**9 if kind == "single" else 7000
    original = save_tiny(tmp_path, layout=layout, max_shard_bytes=max_shard_bytes)
    generator = np.random.default_rng([len(kind), len(layout)])
    refused, harmless = [], []
    for damage in _damages(tmp_path, kind, generator):
        intact = (tmp_path / damage.file).read_bytes()
        if damage.content == intact:
            continue
        (tmp_path / damage.file).write_bytes(damage.content)
        error = _refusal(tmp_path, original, damage.what)
        if error is None:
            harmless.append(damage.what)
        else:
            assert str(tmp_path) in error.cause, damage.what
            assert error.hint, damage.what
            assert len(error.cause) < 2000, damage.what
            refused.append(damage.what)
        (tmp_path / damage.file).write_bytes(intact)
    assert is_same(weights_of(params.load(tmp_path)), original)
    assert len(refused) > 200
    # Metadata, blanks and fields without effect on weights: some damage is none.
    assert harmless
    assert not [what for what in harmless if "cut" in what or "not finite" in what]


def _refusal(folder: Path, original: Weights, what: str) -> MoejaxError | None:
    """The error that refuses the folder; None if its weights are the original's."""
    try:
        loaded = params.load(folder)
    except MoejaxError as error:
        return error
    assert is_same(weights_of(loaded), original), what
    return None


def _damages(folder: Path, kind: str, generator: np.random.Generator) -> Iterator[Damage]:
    weights = SINGLE if kind == "single" else SHARD
    yield from _damaged_bytes(folder, weights, 60, generator)
    yield from _damaged_headers(folder, weights, 80, generator)
    yield from _damaged_data(folder, weights, 10, generator)
    yield from _damaged_bytes(folder, CONFIG, 30, generator)
    yield from _damaged_fields(folder, 120, generator)
    if kind == "sharded":
        yield from _damaged_bytes(folder, INDEX, 30, generator)
        yield from _damaged_index(folder, 40, generator)


def _damaged_bytes(
    folder: Path, file: str, count: int, generator: np.random.Generator
) -> Iterator[Damage]:
    """Flipped bits, of a safetensors file in its header only; cuts and appended bytes."""
    content = (folder / file).read_bytes()
    is_weights = file.endswith(".safetensors")
    length = 8 + int.from_bytes(content[:8], "little") if is_weights else len(content)
    for _ in range(count):
        # The length of the header and its first entries deserve more than their share.
        place = int(generator.integers(0, length if generator.random() < 0.8 else 24))
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        yield Damage(f"{file}: bit of byte {place}", file, bytes(changed))
    # A trailing line break of a JSON file is not missed.
    for place in [0, 1, 7, 8, 9, *generator.integers(0, len(content) - 2, count // 4)]:
        yield Damage(f"{file}: cut at {place}", file, content[: int(place)])
    for more in (b"\0", b" ", b"}", content):
        yield Damage(f"{file}: longer by {more[:8]!r}", file, content + more)
    yield Damage(f"{file}: deep", file, DEEP)
    if is_weights:
        data = content[length:]
        for text in (DEEP, b"{}", b"[]", b"null", b"\xff" * 64, b'{"a":' + DEEP):
            yield Damage(f"{file}: header {text[:8]!r}", file, _joined(text, data))


def _damaged_headers(
    folder: Path, file: str, count: int, generator: np.random.Generator
) -> Iterator[Damage]:
    """Sound JSON that says something else."""
    for number in range(count):
        header, data = split_file(folder / file)
        header.pop("__metadata__")
        names = list(header)
        name = str(generator.choice(names))
        other = next(n for n in names if _num_bytes(header[n]) != _num_bytes(header[name]))
        entry, value = header[name], HOSTILE[int(generator.integers(len(HOSTILE)))]
        begin, end = entry["data_offsets"]
        shift = int(generator.integers(1, 9)) * 2
        match number % 12:
            case 0:
                entry["data_offsets"] = [begin + shift, end + shift]
            case 1:
                entry["data_offsets"] = [begin, end + shift]
            case 2:
                entry["data_offsets"][int(generator.integers(2))] = value
            case 3:
                entry["shape"] = [*entry["shape"][::-1], int(generator.integers(3))]
            case 4:
                entry["shape"] = [value, *entry["shape"][1:]]
            case 5:
                entry["shape"] = value
            case 6:
                entry["dtype"] = str(generator.choice(["F32", "F64", "I16", "U8", "BF17", ""]))
            case 7:
                header[f"{name}{generator.choice(['', 's', '.weight'])} "] = header.pop(name)
            case 8:
                del header[name]
            case 9:
                entry["data_offsets"], header[other]["data_offsets"] = (
                    header[other]["data_offsets"],
                    entry["data_offsets"],
                )
            case 10:
                header[name] = value
            case _:
                header[f"{name}.copy"] = entry
        yield Damage(f"{file}: {name} as {header.get(name)}", file, _joined(header, data))


def _num_bytes(entry: dict[str, Any]) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


def _damaged_data(
    folder: Path, file: str, count: int, generator: np.random.Generator
) -> Iterator[Damage]:
    header, data = split_file(folder / file)
    for _ in range(count):
        values = np.frombuffer(data, np.uint16).copy()
        place = int(generator.integers(values.size))
        values[place] = generator.choice([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
        yield Damage(f"{file}: {place} not finite", file, _joined(header, values.tobytes()))


def _damaged_fields(folder: Path, count: int, generator: np.random.Generator) -> Iterator[Damage]:
    fields = json.loads((folder / CONFIG).read_text())
    names = [*fields, "layer_types", "rope_scaling", "head_dim", "rope_theta", "torch_dtype"]
    for number in range(count):
        name = names[number % len(names)]
        value = HOSTILE[int(generator.integers(len(HOSTILE)))]
        changed = {**fields, name: value}
        if generator.random() < 0.2:
            del changed[name]
        yield Damage(f"{CONFIG}: {name} = {value!r:.40}", CONFIG, json.dumps(changed).encode())


def _damaged_index(folder: Path, count: int, generator: np.random.Generator) -> Iterator[Damage]:
    files = [SHARD, "model-00003-of-00003.safetensors", f"../{SHARD}", f"/{SHARD}", "", "x", 3]
    for _ in range(count):
        index = json.loads((folder / INDEX).read_text())
        table = index["weight_map"]
        name = str(generator.choice(list(table)))
        match int(generator.integers(4)):
            case 0:
                table[name] = files[int(generator.integers(len(files)))]
            case 1:
                table[f"{name}s"] = table.pop(name)
            case 2:
                del table[name]
            case _:
                index["weight_map"] = HOSTILE[int(generator.integers(len(HOSTILE)))]
        yield Damage(f"{INDEX}: {name}", INDEX, json.dumps(index).encode())


def _joined(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
