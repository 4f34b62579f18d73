"""The routed experts of one layer: one computation, several ways to run it.

Every way takes the same arguments and gives the same sum over a token's experts, up to the order
in which floating-point numbers are added:

    y[t] = sum_k routing_weights[t, k] * down(silu(gate(x[t])) * up(x[t])),  e = selected[t, k]

Products are accumulated in float32 whatever the type of the weights. Which way is fastest
depends on how many tokens share the weights that are read; see `choose_experts`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.errors import UsageError

from ._blocks import is_slow_for_one_row

ExpertsFunction: TypeAlias = Callable[..., Array]

# Pairs of one expert that `rounds` computes at once, at least.
_LEAST_ROWS = 16


def experts(
    x: Float[Array, "tokens hidden"],
    selected_experts: Int[Array, "tokens topk"],
    routing_weights: Float[Array, "tokens topk"],
    gate_up_proj: Float[Array, "experts ffn2 hidden"],
    down_proj: Float[Array, "experts hidden ffn"],
    *,
    implementation: str | ExpertsFunction = "auto",
    dtype: DTypeLike | None = None,
) -> Float[Array, "tokens hidden"]:
    """Sends every token through its experts and adds what they say.

    Args:
      x: Hidden states that enter the experts.
      selected_experts: The router's choice for each token; distinct within a token. To
        `dense`, `scan` and `rounds` a number that no expert has means nothing.
      routing_weights: What each chosen expert's answer counts.
      gate_up_proj: Gate and up matrices of every expert, one above the other.
      down_proj: Down matrices of every expert.
      implementation: A name of `EXPERTS`, a function of the same arguments, or `auto`: what was
        fastest for this number of tokens on this kind of device.
      dtype: Type of the answer; by default that of `x`.

    Raises:
      UsageError: The implementation is not known.

    Reference:
      Qwen Team, "Qwen1.5-MoE", 2024; the reference implementation is Qwen2MoeSparseMoeBlock.
    """
    if implementation == "auto":
        implementation = choose_experts(x.shape[0], jax.default_backend())
    if isinstance(implementation, str):
        if implementation not in EXPERTS:
            raise UsageError(
                f"experts implementation {implementation!r} is not known",
                f"Known: auto, {', '.join(EXPERTS)}.",
            )
        implementation = EXPERTS[implementation]
    y = implementation(x, selected_experts, routing_weights, gate_up_proj, down_proj)
    return y.astype(dtype or x.dtype)


def choose_experts(num_tokens: int, platform: str) -> str:
    """The implementation that was fastest for this many tokens; see reports/h100-model.

    Few tokens read only the experts they chose. Soon nearly every expert is chosen by someone, and
    a single product that reads them all is faster, until it is the arithmetic that takes long.

    Args:
      num_tokens: Tokens of one call, all requests together.
      platform: `jax.default_backend()`: cpu, gpu or another.
    """
    if platform == "gpu":
        # `dense` was fastest to the end of the sweep; beyond, its intermediates take gigabytes.
        few, some, many = 8, 2048, "scan"
    else:
        few, some, many = 2, 16, "rounds"
    if num_tokens <= few:
        return "unrolled"
    return "dense" if num_tokens <= some else many


def _gather(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Copies the weights of every (token, expert) pair side by side: simple, for a few tokens."""
    gate_up = _dot("th,tkfh->tkf", x, gate_up_proj[selected_experts])
    y = _dot("tkf,tkhf->tkh", _activate(gate_up, x.dtype), down_proj[selected_experts])
    return _mix(y, routing_weights)


def _unrolled(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """One matrix-vector product per pair, each reading its expert in place: no copy of weights."""
    num_tokens, topk = selected_experts.shape
    rows = []
    for token in range(num_tokens):
        for choice in range(topk):
            expert = selected_experts[token, choice]
            take = partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
            gate_up = _vector_dot(take(gate_up_proj), x[token])
            rows.append(_vector_dot(take(down_proj), _activate(gate_up, x.dtype)))
    return _mix(jnp.stack(rows).reshape(num_tokens, topk, -1), routing_weights)


def _dense(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Every expert computes every token in one batched product, and counts where it was chosen.

    Every weight is read once, whatever the router chose; the intermediates of every expert are kept
    for every token at the same time.
    """
    share = _dense_weights(selected_experts, routing_weights, gate_up_proj.shape[0])
    gate_up = _dot("th,efh->etf", x, gate_up_proj)
    y = _dot("etf,ehf->eth", _activate(gate_up, x.dtype), down_proj)
    return _count(y, share[:, :, None]).sum(0)


def _scan(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """The sum of `dense` expert by expert, in the memory of one."""
    share = _dense_weights(selected_experts, routing_weights, gate_up_proj.shape[0])

    def one_expert(total, expert):
        gate_up_proj, down_proj, share = expert
        y = _dot("tf,hf->th", _activate(_dot("th,fh->tf", x, gate_up_proj), x.dtype), down_proj)
        return total + _count(y, share[:, None]), None

    total = jnp.zeros(x.shape, jnp.float32)
    total, _ = jax.lax.scan(one_expert, total, (gate_up_proj, down_proj, share))
    return total


def _rounds(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Every expert computes some of its pairs at once, and again while one has more.

    A round has room for more pairs than the experts' mean, so that even routing takes one round;
    nothing is dropped, and a round that nobody needs is skipped.
    """
    num_experts, (num_tokens, topk) = gate_up_proj.shape[0], selected_experts.shape
    flat, num_pairs = selected_experts.reshape(-1), selected_experts.size
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts)
    starts = jnp.cumsum(sizes) - sizes
    weights = routing_weights.reshape(-1)
    mean = -(-num_pairs // num_experts)
    num_rows = min(num_tokens, max(_LEAST_ROWS, 1 << (mean - 1).bit_length()))

    def one_round(total, first):
        place = jnp.broadcast_to(first + jnp.arange(num_rows)[None, :], (num_experts, num_rows))
        is_pair = place < sizes[:, None]
        pair = order[jnp.minimum(starts[:, None] + place, num_pairs - 1)]
        token = pair // topk
        gate_up = _dot("erh,efh->erf", x[token], gate_up_proj)
        y = _dot("erf,ehf->erh", _activate(gate_up, x.dtype), down_proj)
        y = jnp.where(is_pair[:, :, None], y * weights[pair][:, :, None], 0.0)
        return total.at[token].add(y)

    def maybe_round(total, first):
        is_needed = first < sizes.max()
        return jax.lax.cond(is_needed, one_round, lambda total, _: total, total, first), None

    total = jnp.zeros(x.shape, jnp.float32)
    total, _ = jax.lax.scan(maybe_round, total, jnp.arange(0, num_tokens, num_rows))
    return total


def _ragged(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Sorts the pairs by expert and multiplies groups of unequal size in one call."""
    num_experts, topk = gate_up_proj.shape[0], selected_experts.shape[1]
    flat = selected_experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    dot = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    gate_up = dot(x[order // topk], gate_up_proj.swapaxes(1, 2))
    y = dot(_activate(gate_up, x.dtype), down_proj.swapaxes(1, 2))
    y = y[jnp.argsort(order)].reshape(*selected_experts.shape, -1)
    return _mix(y, routing_weights)


EXPERTS: Mapping[str, ExpertsFunction] = MappingProxyType(
    {
        "gather": _gather,
        "unrolled": _unrolled,
        "dense": _dense,
        "rounds": _rounds,
        "scan": _scan,
        "ragged": _ragged,
    }
)
"""The implementations by name."""


def _activate(gate_up: Array, dtype: jnp.dtype) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202) of gate and up laid end to end."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def _mix(y: Array, routing_weights: Array) -> Array:
    return (y * routing_weights[..., None]).sum(1)


def _count(y: Array, share: Array) -> Array:
    """Answers as they count: one that was not asked for is zero, even if it overflowed."""
    return jnp.where(share != 0, y * share, 0.0)


def _dense_weights(selected_experts: Array, routing_weights: Array, num_experts: int) -> Array:
    """Routing weights as [experts, tokens], zero where an expert was not chosen."""
    chosen = jax.nn.one_hot(selected_experts, num_experts, axis=0, dtype=routing_weights.dtype)
    return (chosen * routing_weights[None]).sum(-1)


def _vector_dot(matrix: Array, vector: Array) -> Array:
    """A matrix times a vector.

    XLA on a CPU widens a whole bfloat16 matrix before it multiplies it by one row, eight times
    slower than by two; so it gets a second row.
    """
    if is_slow_for_one_row(matrix.dtype):
        return _dot("fh,rh->rf", matrix, jnp.stack([vector, jnp.zeros_like(vector)]))[0]
    return _dot("fh,h->f", matrix, vector)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
