"""Trace files: what is written comes back, and nothing hostile gets in."""

import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest

from moejax.errors import BadFileError, UsageError
from moejax.trace import Trace, load_trace, save_trace, validate_trace

_NONE = 255


def _trace(**changes) -> Trace:
    generator = np.random.default_rng(0)
    experts = generator.permuted(np.tile(np.arange(8, dtype=np.uint8), (6, 3, 1)), axis=2)[..., :2]
    experts[0, 2] = _NONE
    trace = Trace(
        experts=experts,
        num_experts=8,
        request_start=np.array([0, 4, 4, 6], np.int64),
        phase=np.array([0, 0, 1, 1, 0, 1], np.uint8),
        routing_weights=generator.random((6, 3, 2)).astype(np.float16),
        token_ids=np.arange(6, dtype=np.int32),
        lookahead=generator.integers(0, 8, (6, 3, 2, 4)).astype(np.uint8),
        expert_bytes=np.array([100, 200, 300], np.int64),
        model="toy",
        source="made up",
        licence="CC0-1.0",
        is_router_order=True,
        workload="noise",
        warnings=("nothing of this is real",),
    )
    return replace(trace, sha256="", **changes)


def test_what_is_saved_comes_back(tmp_path):
    trace = _trace()
    save_trace(trace, tmp_path / "t.safetensors")
    loaded = load_trace(tmp_path / "t.safetensors")
    for field in fields(Trace):
        before, after = getattr(trace, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(before, after)
        assert not isinstance(before, np.ndarray) or before.dtype == after.dtype
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_only_what_is_there_is_saved(tmp_path):
    optional = ("phase", "routing_weights", "token_ids", "lookahead", "expert_bytes", "workload")
    save_trace(_trace(**dict.fromkeys(optional)), tmp_path / "t.safetensors")
    loaded = load_trace(tmp_path / "t.safetensors")
    assert all(getattr(loaded, name) is None for name in optional)


def test_loading_maps_the_file(tmp_path):
    save_trace(_trace(), tmp_path / "t.safetensors")
    experts = load_trace(tmp_path / "t.safetensors").experts
    base = experts
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        experts[0, 0, 0] = 1


def test_equal_traces_give_equal_bytes(tmp_path):
    save_trace(_trace(), tmp_path / "a")
    save_trace(_trace(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_public_library_reads_it_too(tmp_path):
    from safetensors import safe_open

    trace = _trace()
    save_trace(trace, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("experts"), trace.experts)
        metadata = json.loads(file.metadata()["moejax"])
    assert metadata["version"] == 1
    assert metadata["sha256"] == trace.sha256


def test_many_experts_take_sixteen_bits(tmp_path):
    experts = np.array([[[0, 65533]], [[300, 65535]]], np.uint16)
    optional = ("phase", "routing_weights", "token_ids", "lookahead", "expert_bytes")
    trace = _trace(
        experts=experts,
        num_experts=65534,
        request_start=np.array([0, 2], np.int64),
        **dict.fromkeys(optional),
    )
    save_trace(trace, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(load_trace(tmp_path / "t.safetensors").experts, experts)


def test_the_hash_is_of_the_experts():
    trace = _trace()
    assert trace.sha256 == _trace(model="other").sha256
    assert trace.sha256 != _trace(experts=trace.experts[:, :, ::-1].copy()).sha256


def _with(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("experts", lambda t: _with(t.experts, (1, 1, 0), 8), "hold 8"),
        ("experts", lambda t: _with(t.experts, (1, 1), 3), "expert 3 appears twice"),
        ("experts", lambda t: t.experts[:0], "shape"),
        ("experts", lambda t: t.experts[0], "shape"),
        ("num_experts", lambda t: 0, "0 experts"),
        ("num_experts", lambda t: 256, "256 experts"),
        ("num_experts", lambda t: 1, "exceed 1"),
        ("request_start", lambda t: np.array([0, 5], np.int64), "request_start"),
        ("request_start", lambda t: np.array([1, 6], np.int64), "request_start"),
        ("request_start", lambda t: np.array([0, 5, 4, 6], np.int64), "request_start"),
        ("request_start", lambda t: np.array([6], np.int64), "request_start"),
        ("phase", lambda t: t.phase + np.uint8(1), "phase 2"),
        ("phase", lambda t: t.phase[:5], "phase"),
        ("routing_weights", lambda t: _with(t.routing_weights, (2, 0, 0), np.nan), "not finite"),
        ("routing_weights", lambda t: t.routing_weights[:, :2], "routing_weights"),
        ("token_ids", lambda t: t.token_ids[1:], "token_ids"),
        ("expert_bytes", lambda t: t.expert_bytes * 0, "not positive"),
        ("lookahead", lambda t: _with(t.lookahead, (0, 0, 0, 0), 9), "lookahead hold 9"),
        ("lookahead", lambda t: t.lookahead[..., 0], "lookahead"),
    ],
)
def test_inconsistent_traces_are_refused(tmp_path, name, change, said):
    trace = _trace()
    validate_trace(trace)
    changed = change(trace)
    with pytest.raises(BadFileError, match=said):
        validate_trace(replace(trace, **{name: changed}))
    with pytest.raises(BadFileError, match=said):
        save_trace(replace(trace, **{name: changed}), tmp_path / "t")
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    for path in (tmp_path / "no" / "t.safetensors", tmp_path):
        with pytest.raises(UsageError, match="written"):
            save_trace(_trace(), path)


def _edit_header(content: bytes, edit) -> bytes:
    """Applies `edit` to the parsed header, or to its text if it takes a text."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    edited = edit(header)
    text = (edited if isinstance(edited, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def edit(header):
        for key in keys:
            header = header[key]
        header[last] = value

    return edit


def _set_metadata(key, value):
    def edit(header):
        metadata = json.loads(header["__metadata__"]["moejax"])
        metadata[key] = value
        header["__metadata__"]["moejax"] = json.dumps(metadata)

    return edit


def _twice(header):
    text = json.dumps(header)
    return text[:-1] + ', "experts": ' + json.dumps(header["experts"]) + "}"


@pytest.mark.parametrize(
    "edit",
    [
        _set("experts", "shape", [6, 3, 3]),
        _set("experts", "shape", [-6, -3, 2]),
        _set("experts", "shape", [2**62, 2**62, 2**62]),
        _set("experts", "shape", [6, 3, True]),
        _set("experts", "shape", [6.0, 3, 2]),
        _set("experts", "shape", [1] * 100),
        _set("experts", "shape", [36]),
        _set("experts", "shape", "6"),
        _set("experts", "dtype", "F64"),
        _set("experts", "dtype", "I8"),
        _set("experts", "dtype", ["U8"]),
        _set("experts", "data_offsets", [0, 36]),
        _set("experts", "data_offsets", [2**60, 2**60 + 36]),
        _set("experts", "data_offsets", [36, 0]),
        _set("experts", "data_offsets", [0]),
        _set("experts", "data_offsets", None),
        _set("experts", "surprise", 1),
        _set("experts", 3),
        _set("request_start", "dtype", "F16"),
        _set("surprise", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        _set("__metadata__", 3),
        _set("__metadata__", {}),
        _set("__metadata__", "surprise", "x"),
        _set("__metadata__", "moejax", 3),
        _set("__metadata__", "moejax", "{"),
        _set("__metadata__", "moejax", "[" * 100_000),
        _set("__metadata__", "moejax", "[]"),
        _set_metadata("version", 2),
        _set_metadata("num_experts", "8"),
        _set_metadata("num_experts", 8.0),
        _set_metadata("num_experts", True),
        _set_metadata("num_experts", 10**30),
        _set_metadata("num_experts", 4),
        _set_metadata("sha256", "0" * 64),
        _set_metadata("surprise", 1),
        _set_metadata("model", None),
        _set_metadata("workload", 1),
        _set_metadata("warnings", "all of them"),
        _set_metadata("warnings", [1]),
        _twice,
        lambda header: "[]",
        lambda header: "{",
        lambda header: "{}",
        lambda header: '{"experts": NaN}',
        lambda header: "[" * 100_000,
        lambda header: '{"experts": 1' + "0" * 5000 + "}",
    ],
)
def test_hostile_headers_are_refused(tmp_path, edit):
    path = tmp_path / "t.safetensors"
    save_trace(_trace(), path)
    path.write_bytes(_edit_header(path.read_bytes(), edit))
    with pytest.raises(BadFileError, match=r"t\.safetensors"):
        load_trace(path)


def test_overlapping_tensors_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_trace(_trace(), path)

    def overlap(header):
        header["token_ids"]["data_offsets"] = header["experts"]["data_offsets"][:1] * 2
        header["token_ids"]["shape"] = [0]
        header["phase"]["data_offsets"] = [
            header["experts"]["data_offsets"][0],
            header["experts"]["data_offsets"][0] + 6,
        ]

    path.write_bytes(_edit_header(path.read_bytes(), overlap))
    with pytest.raises(BadFileError, match="overlap"):
        load_trace(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_trace(_trace(), path)
    content = path.read_bytes()
    for length in [*range(0, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(BadFileError):
            load_trace(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(BadFileError, match="bytes of data"):
        load_trace(path)


def test_a_changed_expert_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    save_trace(_trace(experts=np.full((6, 3, 1), 2, np.uint8), routing_weights=None), path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"\2" * 18)] = 3
    path.write_bytes(content)
    with pytest.raises(BadFileError, match="hash"):
        load_trace(path)


def test_what_is_no_file_is_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    huge = tmp_path / "huge"
    huge.write_bytes((2**63).to_bytes(8, "little") + b"{}" * 100)
    for path in (tmp_path, tmp_path / "absent", loop, pipe, huge, "/dev/zero", "a\0b"):
        with pytest.raises(BadFileError):
            load_trace(path)


def test_an_archive_is_told_to_be_imported(tmp_path):
    np.savez(tmp_path / "x.npz", expert_ids=np.zeros((1, 1, 1), np.uint8))
    with pytest.raises(BadFileError) as caught:
        load_trace(tmp_path / "x.npz")
    assert "moejax trace import" in caught.value.hint
