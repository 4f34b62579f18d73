import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.offload import ExpertLayout, pack, unpack

LAYOUT = ExpertLayout(num_experts=3, hidden=8, ffn=6, dtype="bfloat16")


def matrices() -> tuple[np.ndarray, np.ndarray]:
    numbers = iter(np.arange(3 * 18 * 8, dtype=np.float32))
    gate_up = np.fromiter(numbers, np.float32, 3 * 12 * 8).reshape(3, 12, 8)
    return gate_up, np.fromiter(numbers, np.float32).reshape(3, 8, 6)


def test_sizes():
    assert (LAYOUT.num_rows, LAYOUT.shape) == (18, (3, 18, 8))
    assert (LAYOUT.row_bytes, LAYOUT.expert_bytes, LAYOUT.layer_bytes) == (16, 288, 864)
    qwen = ExpertLayout(num_experts=60, hidden=2048, ffn=1408, dtype="bfloat16")
    assert qwen.expert_bytes == 17_301_504


def test_what_is_packed_comes_back():
    gate_up, down = matrices()
    packed = pack(gate_up, down)
    assert packed.shape == LAYOUT.shape
    for back in (unpack(packed), jax.jit(unpack)(jnp.asarray(packed))):
        np.testing.assert_array_equal(back[0], gate_up)
        np.testing.assert_array_equal(back[1], down)


def test_an_expert_is_gate_then_up_then_down():
    gate_up, down = matrices()
    expert = pack(gate_up, down)[1]
    np.testing.assert_array_equal(expert[:6], gate_up[1, :6])
    np.testing.assert_array_equal(expert[6:12], gate_up[1, 6:])
    np.testing.assert_array_equal(expert[12:].reshape(-1), down[1].reshape(-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packing_writes_into_a_given_array_in_its_type(dtype):
    out = np.full(LAYOUT.shape, -1, jnp.dtype(dtype))
    gate_up, down = matrices()
    assert pack(gate_up, down, out=out) is out
    np.testing.assert_array_equal(unpack(out)[1], down.astype(out.dtype))
    np.testing.assert_array_equal(out[:, :12], gate_up.astype(out.dtype))
