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
from jaxtyping import Array, Float, Int

from moejax.errors import UsageError

ExpertsFunction: TypeAlias = Callable[..., Array]

# Rows that `buckets` computes with one expert at a time: a matrix unit's tile on most machines.
_BUCKET_ROWS = 32


def experts(
    x: Float[Array, "tokens hidden"],
    selected_experts: Int[Array, "tokens topk"],
    routing_weights: Float[Array, "tokens topk"],
    gate_up_proj: Float[Array, "experts ffn2 hidden"],
    down_proj: Float[Array, "experts hidden ffn"],
    *,
    implementation: str | ExpertsFunction = "auto",
) -> Float[Array, "tokens hidden"]:
    """Sends every token through its experts and adds what they say.

    Args:
      x: Hidden states that enter the experts.
      selected_experts: The router's choice for each token; distinct within a token.
      routing_weights: What each chosen expert's answer counts.
      gate_up_proj: Gate and up matrices of every expert, one above the other.
      down_proj: Down matrices of every expert.
      implementation: A name of `EXPERTS`, a function of the same arguments, or `auto`: what was
        fastest for this number of tokens on this kind of device.

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
    return implementation(x, selected_experts, routing_weights, gate_up_proj, down_proj)


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
        few, some, many = 2, 64, "buckets"
    if num_tokens <= few:
        return "unrolled"
    return "dense" if num_tokens <= some else many


def _gather(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Copies the weights of every (token, expert) pair side by side: simple, for a few tokens."""
    gate_up = _dot("th,tkfh->tkf", x, gate_up_proj[selected_experts])
    y = _dot("tkf,tkhf->tkh", _activate(gate_up, x.dtype), down_proj[selected_experts])
    return _mix(y, routing_weights, x.dtype)


def _unrolled(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """One matrix-vector product per pair, each reading its expert in place: no copy of weights."""
    num_tokens, topk = selected_experts.shape
    rows = []
    for token in range(num_tokens):
        for choice in range(topk):
            expert = selected_experts[token, choice]
            take = partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
            gate_up = _dot("fh,h->f", take(gate_up_proj), x[token])
            rows.append(_dot("hf,f->h", take(down_proj), _activate(gate_up, x.dtype)))
    return _mix(jnp.stack(rows).reshape(num_tokens, topk, -1), routing_weights, x.dtype)


def _dense(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Every expert computes every token in one batched product, and counts where it was chosen.

    Every weight is read once, whatever the router chose; the intermediates of every expert are kept
    for every token at the same time.
    """
    share = _dense_weights(selected_experts, routing_weights, gate_up_proj.shape[0])
    gate_up = _dot("th,efh->etf", x, gate_up_proj)
    y = _dot("etf,ehf->eth", _activate(gate_up, x.dtype), down_proj)
    return (y * share[:, :, None]).sum(0).astype(x.dtype)


def _scan(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """The sum of `dense` expert by expert, in the memory of one."""
    share = _dense_weights(selected_experts, routing_weights, gate_up_proj.shape[0])

    def one_expert(total, expert):
        gate_up_proj, down_proj, share = expert
        y = _dot("tf,hf->th", _activate(_dot("th,fh->tf", x, gate_up_proj), x.dtype), down_proj)
        return total + y * share[:, None], None

    total = jnp.zeros(x.shape, jnp.float32)
    total, _ = jax.lax.scan(one_expert, total, (gate_up_proj, down_proj, share))
    return total.astype(x.dtype)


def _buckets(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """Sorts the pairs by expert into buckets of one expert each, and computes bucket by bucket.

    An expert gets as many buckets as it needs, so nothing overflows; with P pairs and E experts
    at most P / rows + E buckets are filled, and that many are computed.
    """
    num_experts, num_pairs = gate_up_proj.shape[0], selected_experts.size
    pair_of_row, expert_of_bucket = _fill_buckets(selected_experts, num_experts)
    # Row `num_pairs` stands for an empty place: it reads zeros and its answer is not taken.
    token_of_row = jnp.minimum(pair_of_row // selected_experts.shape[1], x.shape[0])
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])

    def one_bucket(_, bucket):
        tokens, expert = bucket
        take = partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
        gate_up = _dot("th,fh->tf", padded[tokens], take(gate_up_proj))
        return None, _dot("tf,hf->th", _activate(gate_up, x.dtype), take(down_proj))

    buckets = (token_of_row.reshape(-1, _BUCKET_ROWS), expert_of_bucket)
    _, y = jax.lax.scan(one_bucket, None, buckets)
    row_of_pair = (
        jnp.zeros(num_pairs, jnp.int32)
        .at[pair_of_row]
        .set(jnp.arange(pair_of_row.size, dtype=jnp.int32), mode="drop")
    )
    y = y.reshape(-1, x.shape[1])[row_of_pair].reshape(*selected_experts.shape, -1)
    return _mix(y, routing_weights, x.dtype)


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
    return _mix(y, routing_weights, x.dtype)


EXPERTS: Mapping[str, ExpertsFunction] = MappingProxyType(
    {
        "gather": _gather,
        "unrolled": _unrolled,
        "dense": _dense,
        "buckets": _buckets,
        "scan": _scan,
        "ragged": _ragged,
    }
)
"""The implementations by name."""


def _activate(gate_up: Array, dtype: jnp.dtype) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202) of gate and up laid end to end."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def _mix(y: Array, routing_weights: Array, dtype: jnp.dtype) -> Array:
    return (y * routing_weights[..., None]).sum(1).astype(dtype)


def _dense_weights(selected_experts: Array, routing_weights: Array, num_experts: int) -> Array:
    """Routing weights as [experts, tokens], zero where an expert was not chosen."""
    chosen = jax.nn.one_hot(selected_experts, num_experts, axis=0, dtype=routing_weights.dtype)
    return (chosen * routing_weights[None]).sum(-1)


def _fill_buckets(selected_experts: Array, num_experts: int) -> tuple[Array, Array]:
    """Gives every row of every bucket its pair, and every bucket its expert.

    Returns:
      Pair of each row, the number of pairs where a row is empty; expert of each bucket.
    """
    flat = selected_experts.reshape(-1)
    num_pairs = flat.size
    num_buckets = num_pairs // _BUCKET_ROWS + min(num_experts, num_pairs)
    sizes = jnp.bincount(flat, length=num_experts)
    num_filled = (sizes + _BUCKET_ROWS - 1) // _BUCKET_ROWS
    first_bucket = jnp.cumsum(num_filled) - num_filled
    order = jnp.argsort(flat, stable=True)
    rank = jnp.arange(num_pairs) - (jnp.cumsum(sizes) - sizes)[flat[order]]
    row = first_bucket[flat[order]] * _BUCKET_ROWS + rank
    pair_of_row = jnp.full(num_buckets * _BUCKET_ROWS, num_pairs).at[row].set(order)
    bucket = jnp.arange(num_buckets)
    expert_of_bucket = jnp.searchsorted(jnp.cumsum(num_filled), bucket, side="right")
    return pair_of_row, jnp.minimum(expert_of_bucket, num_experts - 1)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
