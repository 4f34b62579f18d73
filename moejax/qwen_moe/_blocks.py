"""The parts every transformer of the family has: linear map, norm, MLP, embedding, rotation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ._config import QwenMoeConfig


class Linear(nnx.Module):
    """A matrix in the checkpoint's orientation [out, in], with or without a bias."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        config: QwenMoeConfig,
        *,
        has_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.weight = nnx.Param(normal(rngs, (num_out, num_in), config, dtype))
        self.bias = nnx.Param(jnp.zeros(num_out, dtype)) if has_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The product of `x` and the matrix, plus the bias if there is one."""
        y = product(x, self.weight[...], x.dtype)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467), computed in float32."""

    def __init__(self, num_features: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(num_features, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """`x` at unit root mean square, times the weight."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return jnp.broadcast_to(self.weight[...], x.shape) * wide.astype(x.dtype)


class MLP(nnx.Module):
    """A gated feed-forward block: the shared expert, or a whole layer without experts."""

    def __init__(self, num_ffn: int, config: QwenMoeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.gate_proj = Linear(hidden, num_ffn, config, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, num_ffn, config, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(num_ffn, hidden, config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        """SwiGLU of `x`."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nnx.Module):
    """One row per token of the vocabulary."""

    def __init__(self, config: QwenMoeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(normal(rngs, shape, config, dtype))

    def __call__(self, token_ids: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """The rows of the tokens."""
        return self.weight[...][token_ids]


def product(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: DTypeLike
) -> Float[Array, "*batch out"]:
    """`x` times a matrix in the checkpoint's orientation, the answer of type `dtype`."""
    if not is_slow_for_one_row(weight.dtype):
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    y = jnp.einsum("ri,oi->ro", rows, weight, preferred_element_type=jnp.float32)
    return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], -1).astype(dtype)


def is_slow_for_one_row(dtype: DTypeLike) -> bool:
    """Whether a matrix of this type is widened as a whole to multiply one row: bfloat16 on a CPU.

    There, one row of 2,048 by 75,968 takes 520 ms and two rows take 60 (jax 0.10.2).
    """
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    positions: Int[Array, "batch tokens"],
    theta: float,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotary position embedding, the two halves of a head as the two coordinates.

    Reference:
      Su et al., arXiv:2104.09864, section 3.2, in the "rotate half" layout of GPT-NeoX.
    """
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = (f(angles).astype(x.dtype)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], config: QwenMoeConfig, dtype: DTypeLike
) -> Array:
    """Fresh weights as the reference draws them."""
    return (config.initializer_range * jax.random.normal(rngs.params(), shape)).astype(dtype)
