"""Safetensors files of any kind: what is written comes back, and headers are believed nothing."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from moejax.errors import BadFileError
from moejax.tensors import (
    DTYPES,
    FileKind,
    TensorShape,
    map_tensors,
    parse_table,
    read_header,
    write_tensors,
)

KIND = FileKind("box", ("BF16", "F16", "F32", "U8"), 10**5, "Pack it anew.", "Unzip it.")
EVERY = KIND._replace(dtypes=tuple(DTYPES))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _tensors() -> dict[str, np.ndarray]:
    return {
        "odd": np.arange(3, dtype=np.uint8),
        "half": np.linspace(0, 1, 6).astype(BFLOAT16).reshape(2, 3),
        "whole": np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 2, 2),
        "scalar": np.array(7, np.float16),
        "none": np.zeros((0, 5), np.float32),
    }


def _write(path, tensors, metadata=None):
    shapes = {name: TensorShape(array.dtype, array.shape) for name, array in tensors.items()}
    write_tensors(path, shapes, tensors.__getitem__, metadata or {})


def _write_header(path, header, num_data_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_data_bytes))


def test_what_is_written_comes_back(tmp_path):
    _write(tmp_path / "x", _tensors(), {"format": "pt"})
    mapped, metadata = map_tensors(tmp_path / "x", KIND)
    assert metadata == {"format": "pt"}
    assert mapped.keys() == _tensors().keys()
    for name, array in _tensors().items():
        assert mapped[name].dtype == array.dtype
        np.testing.assert_array_equal(mapped[name], array)
        assert not mapped[name].flags.writeable


def test_every_type_comes_back(tmp_path):
    tensors = {name: np.ones((2, 3), dtype) for name, dtype in DTYPES.items()}
    _write(tmp_path / "x", tensors)
    mapped, _ = map_tensors(tmp_path / "x", EVERY)
    assert {name: array.dtype for name, array in mapped.items()} == dict(DTYPES)


def test_the_header_says_where_to_read(tmp_path):
    path = tmp_path / "x"
    _write(path, _tensors())
    content = path.read_bytes()
    for name, info in read_header(path, KIND)[0].items():
        data = content[info.offset_bytes : info.offset_bytes + info.num_bytes]
        assert data == _tensors()[name].tobytes()
        assert info.path == path
        # Wide types come first, so none starts in the middle of one of its elements.
        assert info.offset_bytes % info.dtype.itemsize == 0


def test_the_public_library_reads_it_too(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = {name: array for name, array in _tensors().items() if name != "half"}
    _write(tmp_path / "ours", tensors)
    for name, array in load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, tensors[name])
    save_file(tensors, tmp_path / "theirs")
    for name, array in map_tensors(tmp_path / "theirs", KIND)[0].items():
        np.testing.assert_array_equal(array, tensors[name])


def test_one_tensor_is_made_at_a_time(tmp_path):
    tensors, made = _tensors(), []

    def make(name):
        made.append(name)
        return tensors[name]

    shapes = {name: TensorShape(array.dtype, array.shape) for name, array in tensors.items()}
    write_tensors(tmp_path / "x", shapes, make, {})
    assert made == ["whole", "none", "half", "scalar", "odd"]
    with pytest.raises(ValueError, match="half is float32"):
        write_tensors(tmp_path / "x", shapes, lambda name: np.ones(shapes[name].shape, "f4"), {})


def test_a_kind_says_what_it_is_and_how_to_mend_it(tmp_path):
    with pytest.raises(BadFileError) as caught:
        read_header(tmp_path / "absent", KIND)
    assert (
        caught.value.cause == f"{tmp_path / 'absent'} is not a sound box: No such file or directory"
    )
    assert caught.value.hint == "Pack it anew."
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    with pytest.raises(BadFileError, match="zip archive") as caught:
        read_header(tmp_path / "x.npz", KIND)
    assert caught.value.hint == "Unzip it."


def test_types_that_the_kind_lacks_are_refused(tmp_path):
    _write(tmp_path / "x", {"counts": np.ones(3, np.int64)})
    read_header(tmp_path / "x", EVERY)
    with pytest.raises(BadFileError, match="'counts' has type 'I64', which is none of BF16, F16"):
        read_header(tmp_path / "x", KIND)


def test_long_headers_are_refused(tmp_path):
    tensors = {f"tensor of a long name {number:05d}": np.ones(1, "f4") for number in range(1500)}
    _write(tmp_path / "x", tensors)
    assert len(read_header(tmp_path / "x", KIND._replace(max_header_bytes=10**6))[0]) == 1500
    with pytest.raises(BadFileError, match="does not begin like"):
        read_header(tmp_path / "x", KIND)


def test_eight_dimensions_are_enough(tmp_path):
    _write(tmp_path / "x", {"a": np.ones((1,) * 8, "f4")})
    read_header(tmp_path / "x", KIND)
    _write(tmp_path / "x", {"a": np.ones((1,) * 9, "f4")})
    with pytest.raises(BadFileError, match="too many dimensions"):
        read_header(tmp_path / "x", KIND)


def _entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            {"a": _entry([2], [0, 8]), "b": _entry([2], [4, 12])},
            "overlap or leave a hole at byte 4",
        ),
        ({"a": _entry([2], [0, 8]), "b": _entry([1], [12, 16])}, "leave a hole at byte 12"),
        ({"a": _entry([1], [4, 8])}, "leave a hole at byte 4"),
        ({"a": _entry([2], [0, 8])}, "16 bytes of data where the header announces 8"),
        ({"a": _entry([8], [0, 32])}, "16 bytes of data where the header announces 32"),
        ({"a": _entry([3], [0, 16])}, "does not fill bytes 0..16"),
        ({"a": _entry([4], [16, 0])}, "does not fill bytes 16..0"),
        ({"a": _entry([2**62, 2**62], [0, 16])}, "does not fill"),
        ({"a": _entry([-4], [0, 16])}, "no list of whole numbers"),
        ({"a": _entry([True, 4], [0, 16])}, "no list of whole numbers"),
        ({"a": _entry([4.0], [0, 16])}, "no list of whole numbers"),
        ({"a": _entry([4], [0, 8, 16])}, "too many dimensions or offsets"),
        ({"a": _entry([4], [0, 16], ["F32"])}, "has type"),
        ({"a": {**_entry([4], [0, 16]), "more": 1}}, "is not dtype, shape and data_offsets"),
        ({"a": None}, "is not dtype, shape and data_offsets"),
        ({"__metadata__": []}, "metadata is no table"),
        ({}, "16 bytes of data where the header announces 0"),
        (b"[]", "holds no table"),
        (b'{"a": 1, "a": 1}', "names something twice"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b"\xff\xff", "decode"),
        (b"[" * 50_000, "recursion"),
        (b"1" * 5_000, "digits"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, header, said):
    _write_header(tmp_path / "x", header, 16)
    for read in (read_header, map_tensors):
        with pytest.raises(BadFileError) as caught:
            read(tmp_path / "x", KIND)
        assert said in caught.value.cause


def test_every_length_but_the_right_one_is_refused(tmp_path):
    path = tmp_path / "x"
    _write(path, _tensors())
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BadFileError):
            read_header(path, KIND)
    path.write_bytes(content + b"\0")
    with pytest.raises(BadFileError, match="bytes of data"):
        read_header(path, KIND)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "a\0b"):
        with pytest.raises(BadFileError, match="not a sound box"):
            read_header(path, KIND)


def test_tables_are_strict():
    assert parse_table(b' {"a": [1, {}]} ') == {"a": [1, {}]}
    for text in (b"", b"3", b"{} {}", b'{"a": NaN}', b'{"a": {"b": 1, "b": 2}}'):
        with pytest.raises(ValueError):
            parse_table(text)
