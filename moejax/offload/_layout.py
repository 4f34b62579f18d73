"""How the experts of one layer lie in one array, so that an expert is one run of bytes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped


class ExpertLayout(NamedTuple):
    """Sizes of one layer's packed experts, an array `[num_experts, num_rows, hidden]`.

    Of an expert's rows the first `ffn` are its gate matrix and the next `ffn` its up matrix. The
    rest hold the down matrix, `[hidden, ffn]` in row-major order: reshaped to
    `[num_experts, 3 * hidden, ffn]`, without moving a byte, its rows are the last `hidden`.

    Attributes:
      num_experts: Experts of a layer.
      hidden: Width of the residual stream.
      ffn: Width of an expert.
      dtype: Type of the weights, such as `bfloat16`.
    """

    num_experts: int
    hidden: int
    ffn: int
    dtype: str

    def share(self, num_devices: int) -> "ExpertLayout":
        """What each of several devices has of a layer; the last expert of some may be a blank."""
        return self._replace(num_experts=-(-self.num_experts // num_devices))

    @property
    def num_rows(self) -> int:
        """Rows of one expert."""
        return 3 * self.ffn

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one packed layer."""
        return self.num_experts, self.num_rows, self.hidden

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * jnp.dtype(self.dtype).itemsize

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.num_rows * self.row_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one packed layer."""
        return self.num_experts * self.expert_bytes


def pack(
    gate_up: Shaped[np.ndarray, "experts ffn2 hidden"],
    down: Shaped[np.ndarray, "experts hidden ffn"],
    out: Shaped[np.ndarray, "experts ffn3 hidden"] | None = None,
) -> Shaped[np.ndarray, "experts ffn3 hidden"]:
    """Packs one layer on the host.

    Args:
      gate_up: Gate and up matrices of every expert, one above the other.
      down: Down matrices of every expert.
      out: Where to write them; by default a new array.

    Returns:
      The packed layer.
    """
    num_experts, num_gate_up, hidden = gate_up.shape
    if out is None:
        out = np.empty((num_experts, num_gate_up + down.shape[2], hidden), gate_up.dtype)
    out[:, :num_gate_up] = gate_up
    out[:, num_gate_up:] = down.reshape(num_experts, -1, hidden)
    return out


def unpack(
    packed: Shaped[Any, "experts ffn3 hidden"],
) -> tuple[Shaped[Any, "experts ffn2 hidden"], Shaped[Any, "experts hidden ffn"]]:
    """The two arrays that `pack` was given; works on numpy and, under `jit`, on JAX arrays."""
    num_experts, num_rows, hidden = packed.shape
    ffn = num_rows // 3
    down = packed.reshape(num_experts, 3 * hidden, ffn)[:, 2 * hidden :]
    return packed[:, : 2 * ffn], down
