"""Importers: every documented spelling, the recorded arrays, and bad files."""

import time

import numpy as np
import pytest

from moejax.errors import BadFileError, UsageError
from moejax.trace import import_trace

_IDS = np.array([[[3, 1], [0, 2]], [[1, 0], [4, 3]], [[2, 3], [1, 0]]])


def _savez(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_npz_with_everything(tmp_path):
    weights = np.tile([0.75, 0.25], (3, 2, 1)).astype(np.float32)
    path = _savez(
        tmp_path / "x.npz",
        expert_ids=_IDS,
        offsets=np.array([0, 1, 3]),
        is_decode=np.array([False, True, True]),
        gate_prob=weights,
        local_token_id=np.array([7, 8, 9], np.uint16),
        expert_bytes=np.array([10, 20]),
        num_experts=np.array(6),
        names=np.array(["a", "b"]),
    )
    trace = import_trace(path, model="toy", source="here", licence="MIT")
    np.testing.assert_array_equal(trace.experts, _IDS)
    assert trace.experts.dtype == np.uint8
    assert trace.num_experts == 6
    assert trace.request_start.tolist() == [0, 1, 3]
    assert trace.phase.tolist() == [0, 1, 1]
    assert trace.routing_weights.dtype == np.float16
    assert trace.token_ids.tolist() == [7, 8, 9]
    assert trace.expert_bytes.tolist() == [10, 20]
    assert trace.is_router_order
    assert (trace.model, trace.source, trace.licence) == ("toy", "here", "MIT")
    assert trace.workload is None
    assert trace.warnings == ()


def test_npz_with_ids_only(tmp_path):
    trace = import_trace(_savez(tmp_path / "x.npz", expert_ids=_IDS))
    assert trace.request_start.tolist() == [0, 3]
    assert trace.num_experts == 5
    assert "5" in trace.warnings[0]
    assert not trace.is_router_order


@pytest.mark.parametrize("none", [-1, -7, 255])
def test_not_computed(tmp_path, none):
    ids = _IDS.copy()
    ids[0, 1] = none
    trace = import_trace(_savez(tmp_path / "x.npz", expert_ids=ids), num_experts=5)
    assert trace.experts[0, 1].tolist() == [255, 255]
    np.testing.assert_array_equal(trace.experts[1:], _IDS[1:])


def test_255_is_an_expert_where_there_are_more(tmp_path):
    ids = np.array([[[255, 1000, 65533, -1]]], np.int64)
    trace = import_trace(_savez(tmp_path / "x.npz", expert_ids=ids))
    assert trace.num_experts == 65534
    assert trace.experts.tolist() == [[[255, 1000, 65533, 65535]]]
    ids = np.array([[[255, 7]]], np.uint8)
    trace = import_trace(_savez(tmp_path / "x.npz", expert_ids=ids), num_experts=256)
    assert trace.experts.tolist() == [[[255, 7]]]
    assert trace.experts.dtype == np.uint16


def test_source_order_is_recognised(tmp_path):
    weights = np.tile([0.25, 0.75], (3, 2, 1))
    path = _savez(tmp_path / "x.npz", expert_ids=_IDS, gate_weights=weights)
    assert not import_trace(path).is_router_order


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"ids": _IDS}, "lacks expert_ids"),
        ({"expert_ids": _IDS[0]}, "shape"),
        ({"expert_ids": _IDS[:0]}, "shape"),
        ({"expert_ids": _IDS.astype(np.float32)}, "float32"),
        ({"expert_ids": _IDS.astype(object)}, "sound"),
        ({"expert_ids": _IDS * 0}, "twice"),
        ({"expert_ids": _IDS * 0 - 1}, "no expert"),
        ({"expert_ids": _IDS + 65533}, "65534"),
        ({"expert_ids": _IDS, "num_experts": np.array(4)}, "there are 4 experts"),
        ({"expert_ids": _IDS, "num_experts": np.array([4, 5])}, "num_experts"),
        ({"expert_ids": _IDS, "offsets": np.array([0, 2])}, "request_start"),
        ({"expert_ids": _IDS, "offsets": np.array([0.0, 3.0])}, "offsets"),
        ({"expert_ids": _IDS, "phase": np.array([0, 1, 2])}, "phase"),
        ({"expert_ids": _IDS, "phase": np.array([0, 1])}, "phase"),
        ({"expert_ids": _IDS, "gate_prob": np.full((3, 2, 2), np.nan)}, "finite"),
        ({"expert_ids": _IDS, "gate_prob": np.full((3, 2, 2), 1e9)}, "finite"),
        ({"expert_ids": _IDS, "gate_prob": np.ones((3, 2))}, "routing weights"),
        ({"expert_ids": _IDS, "token_id": np.array([0, 1, 2**40])}, "token_ids"),
        ({"expert_ids": _IDS, "expert_bytes": np.array([0, 5])}, "not positive"),
    ],
)
def test_bad_npz(tmp_path, arrays, said):
    with pytest.raises(BadFileError, match=said):
        import_trace(_savez(tmp_path / "x.npz", **arrays))


def test_damaged_npz(tmp_path):
    path = _savez(tmp_path / "x.npz", expert_ids=np.tile(_IDS, (200, 1, 1)), offsets=[0, 600])
    content = path.read_bytes()
    for length in range(2, len(content), len(content) // 20):
        path.write_bytes(content[:length])
        with pytest.raises(BadFileError):
            import_trace(path)
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[generator.integers(2, damaged.size, 8)] = generator.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        try:
            import_trace(path)
        except BadFileError:
            continue


def test_number_of_experts_out_of_range(tmp_path):
    path = _savez(tmp_path / "x.npz", expert_ids=_IDS)
    for num_experts in (0, -3, 65535):
        with pytest.raises(UsageError, match=str(num_experts)):
            import_trace(path, num_experts=num_experts)
    with pytest.raises(BadFileError, match="there are 4") as caught:
        import_trace(path, num_experts=4)
    assert "--num-experts" in caught.value.hint


_ROUTES = """# route_trace v1
# model=/models/Toy-Q4.gguf arch=toy n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=200 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,1,1,0.25,0,100
0,0,0,0,0,3,0.75,0,100
0,1,1,0,0,1,0.5,1,0
0,1,1,0,1,0,0.5,1,0
0,1,1,1,0,4,0.5,1,0
0,1,1,1,1,3,0.5,1,0
1,0,0,0,0,5,0.5,1,0
1,0,0,0,1,6,0.5,1,0
"""


def test_route_csv(tmp_path):
    path = tmp_path / "x.route.csv"
    path.write_text(_ROUTES)
    trace = import_trace(path, licence="Apache-2.0")
    assert trace.experts.tolist() == [
        [[3, 1], [255, 255]],
        [[1, 0], [4, 3]],
        [[5, 6], [255, 255]],
    ]
    assert trace.routing_weights[0, 0].tolist() == [0.75, 0.25]
    assert trace.phase.tolist() == [0, 1, 0]
    assert trace.request_start.tolist() == [0, 2, 3]
    assert trace.expert_bytes.tolist() == [100, 200]
    assert trace.num_experts == 8
    assert trace.model == "Toy-Q4"
    assert trace.is_router_order
    assert trace.warnings == ()


def test_plain_csv_and_jsonl_say_the_same(tmp_path):
    rows = [
        (token, layer + 1, _IDS[token, layer].tolist()) for layer in range(2) for token in range(3)
    ]
    table, lines = tmp_path / "x.csv", tmp_path / "x.jsonl"
    table.write_text(
        "Token, Layer, Expert, Weight\n"
        + "".join(f"{t},{n},{a},0.75\n{t},{n},{b},0.25\n" for t, n, (a, b) in rows)
    )
    weights = [0.75, 0.25]
    lines.write_text(
        "".join(
            f'{{"token_idx": {t}, "layer_idx": {n}, "selected_ids": {ids}, '
            f'"gate_weights": {weights}}}\n'
            for t, n, ids in rows
        )
    )
    for trace in (import_trace(table), import_trace(lines)):
        np.testing.assert_array_equal(trace.experts, _IDS)
        assert np.all(trace.routing_weights == np.array([0.75, 0.25]))
        assert trace.is_router_order
        assert trace.num_experts == 5
        assert len(trace.warnings) == 1


def test_jsonl_requests_without_weights(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"request_idx": 1, "token_idx": 0, "layer_idx": 0, "selected_ids": [2]}\n'
        '{"request_idx": 0, "token_idx": 5, "layer_idx": 0, "selected_ids": [1, 0]}\n'
        '{"request_idx": 0, "token_idx": 4, "layer_idx": 0, "selected_ids": [0, 2]}\n'
    )
    trace = import_trace(path, num_experts=3)
    assert trace.experts.tolist() == [[[0, 2]], [[1, 0]], [[2, 255]]]
    assert trace.request_start.tolist() == [0, 2, 3]
    assert trace.routing_weights is None
    assert not trace.is_router_order


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"   \n\n",
        b"\0\1\2\3",
        b"\xff\xfe\xfa",
        b"token,layer\n0,0\n",
        b"token,layer,expert\n",
        b"token,layer,expert\n0,0\n",
        b"token,layer,expert\n0,0,x\n",
        b"token,layer,expert\n0,0,1.5\n",
        b"token,layer,expert\n0,0,-1\n",
        b"token,layer,expert\n0,0,nan\n",
        b"token,layer,expert\n0,0,1e300\n",
        b"token,layer,expert\n0,0,70000\n",
        b"token,layer,expert\n0,0,1\n0,0,1\n",
        b"token,layer,expert,weight\n0,0,1,inf\n",
        b"token,layer,expert,phase\n0,0,1,2\n",
        b"# only a comment\n",
        b"token,layer,expert\n" + b"".join(b"%d,%d,0\n" % (i, i) for i in range(300)),
        b"{",
        b"{}",
        b'{"token_idx": 0, "layer_idx": 0, "selected_ids": 3}',
        b'{"token_idx": 0, "layer_idx": 0, "selected_ids": []}',
        b'{"token_idx": 0, "layer_idx": 0, "selected_ids": ["a"]}',
        b'{"token_idx": 0, "layer_idx": 0, "selected_ids": [[1]]}',
        b'{"token_idx": null, "layer_idx": 0, "selected_ids": [1]}',
        b'{"token_idx": 0, "layer_idx": 0, "selected_ids": [1, 2], "gate_weights": [1]}',
        b'{"token_idx": 0, "layer_idx": 0, "selected_ids": [1]}\n[]',
        b'{"a": ' + b"[" * 100_000,
        (50).to_bytes(8, "little") + b'{"experts": 1}',
    ],
)
def test_bad_text(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match="x"):
        import_trace(path)


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent", "/dev/zero", "a\0b"):
        with pytest.raises(BadFileError):
            import_trace(path)


@pytest.mark.parametrize(
    ("name", "shape", "num_experts", "num_requests"),
    [
        ("deepseek-v2-lite_esft_4domains.npz", (33279, 26, 6), 64, 213),
        ("gpt-oss-20b_decode_ids.npz", (155103, 24, 4), 32, 532),
        ("qwen3-30b-a3b_bigmoe-edge_top6.npz", (156, 48, 6), 128, 1),
    ],
)
def test_recordings(recorded_trace, name, shape, num_experts, num_requests):
    path = recorded_trace(name)
    start = time.perf_counter()
    trace = import_trace(path)
    assert time.perf_counter() - start < 5
    assert trace.experts.shape == shape
    assert trace.num_experts == num_experts
    assert trace.num_requests == num_requests


def test_recording_with_gaps(recorded_trace):
    trace = import_trace(recorded_trace("qwen3-30b-a3b_bigmoe-edge_top6.npz"))
    is_missing = (trace.experts == 255).all(axis=2)
    assert is_missing.any()
    assert not is_missing[trace.phase == 1].any()
    assert not is_missing[:, :-1].any()
    assert trace.is_router_order
