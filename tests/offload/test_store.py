import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moejax.errors import BackendError
from moejax.offload import ExpertLayout, _store, build_store, random_store, unpack

LAYOUT = ExpertLayout(num_experts=3, hidden=8, ffn=6, dtype="float32")
QWEN = ExpertLayout(num_experts=60, hidden=2048, ffn=1408, dtype="bfloat16")
GPU = SimpleNamespace(num_devices=1, devices=[SimpleNamespace(platform="gpu")])


def read_layer(number: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(number)
    shapes = ((3, 12, 8), (3, 8, 6))
    return tuple(generator.standard_normal(shape, np.float32) for shape in shapes)


def test_a_store_holds_every_layer_packed():
    told = []
    store = build_store(LAYOUT, 3, read_layer, on_progress=lambda *pair: told.append(pair))
    assert (store.layout, store.num_layers, store.num_bytes) == (LAYOUT, 3, 3 * 1728)
    assert told == [(1728, 5184), (3456, 5184), (5184, 5184)]
    for number, layer in enumerate(store.layers):
        assert (layer.shape, layer.dtype.name) == (LAYOUT.shape, "float32")
        for array, expected in zip(unpack(layer), read_layer(number), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_weights_are_cast_to_the_type_of_the_store():
    store = build_store(LAYOUT._replace(dtype="bfloat16"), 1, read_layer)
    assert store.layers[0].dtype.name == "bfloat16"
    expected = read_layer(0)[0].astype(store.layers[0].dtype)
    np.testing.assert_array_equal(unpack(store.layers[0])[0], expected)


def test_one_layer_at_a_time_is_in_memory_beside_the_store():
    alive: list[weakref.ref] = []

    def read(number):
        assert not any(array() for array in alive)
        arrays = read_layer(number)
        alive.extend(map(weakref.ref, arrays))
        return arrays

    assert build_store(LAYOUT, 4, read).num_layers == len(alive) / 2 == 4


def test_on_the_cpu_the_packed_array_is_taken_over(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("another device has memory of its own")
    addresses = []

    def note(layout, make=_store._aligned):
        array = make(layout)
        addresses.append(array.ctypes.data)
        return array

    monkeypatch.setattr(_store, "_aligned", note)
    store = build_store(LAYOUT, 2, read_layer)
    assert [layer.unsafe_buffer_pointer() for layer in store.layers] == addresses


def test_random_experts_follow_the_seed():
    layout = ExpertLayout(num_experts=8, hidden=64, ffn=48, dtype="bfloat16")
    store, longer, other = (
        random_store(layout, num_layers, seed) for num_layers, seed in ((2, 0), (3, 0), (2, 1))
    )
    first, second = (np.asarray(layer, np.float32) for layer in store.layers)
    assert first.std() == pytest.approx(0.02, rel=0.02)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    np.testing.assert_array_equal(store.layers[1], longer.layers[1])
    assert (np.asarray(store.layers[0]) != np.asarray(other.layers[0])).any()


def test_repeated_layers_take_memory_once():
    told = []
    store = random_store(LAYOUT, 5, 0, num_distinct=2, on_progress=lambda *pair: told.append(pair))
    first, second = store.layers[:2]
    assert store.layers == (first, second, first, second, first)
    assert store.num_bytes == told[-1][1] == 2 * LAYOUT.layer_bytes


def test_more_than_the_host_has_is_refused_before_reading(monkeypatch):
    monkeypatch.setattr(_store, "_available_bytes", lambda: 16 * 10**9)
    with pytest.raises(BackendError, match=r"take 24\.9 GB of host memory and 16\.0 GB are"):
        build_store(QWEN, 24, lambda number: pytest.fail("a layer was read"))


@pytest.mark.parametrize(
    ("limit", "num_layers", "said"),
    [("", 72, r"74\.7 GB of pinned .* at most 68\.7 GB"), ("20", 24, r"at most 21\.5 GB")],
)
def test_more_than_may_be_pinned_is_refused_with_the_cure(monkeypatch, limit, num_layers, said):
    monkeypatch.setattr(_store, "_available_bytes", lambda: 10**12)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", limit)
    with pytest.raises(BackendError, match=said) as caught:
        build_store(QWEN, num_layers, lambda number: pytest.fail("a layer was read"), team=GPU)
    cures = {24: "LIMIT_GB=30 ", 72: "LIMIT_GB=88 "}
    assert f"XLA_PJRT_GPU_HOST_MEMORY_{cures[num_layers]}" in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory while trying to"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_on_the_way_says_how_far_it_came(monkeypatch, error):
    def put(array, place, device_put=jax.device_put, left=[1, 1]):  # noqa: B006
        if not left:
            raise error
        left.pop()
        return device_put(array, place)

    monkeypatch.setattr(jax, "device_put", put)
    with pytest.raises(BackendError, match=r"after 3\.46 kB of 5\.18 kB") as caught:
        build_store(LAYOUT, 3, read_layer)
    assert "HOST_MEMORY_LIMIT_GB=1 " in caught.value.hint


def test_other_failures_of_the_backend_are_not_explained_away(monkeypatch):
    def put(array, place):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jax, "device_put", put)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        build_store(LAYOUT, 3, read_layer)
