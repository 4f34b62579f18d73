"""The clock of one model on one machine: all that the timeline needs to know about hardware."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax._types import Scalar
from moejax.cards import Hardware, ModelSpec
from moejax.errors import UsageError

from ._compute import smooth_maximum
from ._copy import copy_s, host_expert_s
from ._parameters import CostParameters, from_hardware


class LayerClock(NamedTuple):
    """Times of one layer for one batch size, in seconds, and expert sizes, in bytes.

    Attributes:
      attention_s: Attention, router and fixed cost of a layer, before its demand is known.
      shared_s: Shared expert of a layer; 0 where the model has none.
      expert_read_s: Streaming one resident expert from device memory, per MoE layer.
      expert_token_s: FLOP time of one (token, expert) pair.
      copy_s: One demand copy of one expert from pinned host memory, latency included.
      host_expert_s: One expert computed on the host CPU.
      step_fixed_s: Per decode step: layers without experts, head, sampling.
      overlap_ratio: Share of the shorter of copy and compute that is hidden.
      shadow_copy_s: What a prefetch by an engine's schedule adds to the layers it runs beside.
      expert_bytes: Bytes of one routed expert.
    """

    attention_s: Float[Array, ""]
    shared_s: Float[Array, ""]
    expert_read_s: Float[Array, " layers"]
    expert_token_s: Float[Array, " layers"]
    copy_s: Float[Array, " layers"]
    host_expert_s: Float[Array, " layers"]
    step_fixed_s: Float[Array, ""]
    overlap_ratio: Float[Array, ""]
    shadow_copy_s: Float[Array, " layers"]
    expert_bytes: Float[Array, " layers"]


def layer_clock(
    hardware: Hardware,
    model: ModelSpec,
    *,
    batch_size: int,
    context_tokens: int = 512,
    expert_bytes: Float[Array, " layers"] | np.ndarray | None = None,
    strategy: str | None = None,
) -> LayerClock:
    """The clock of `model` on `hardware`.

    Args:
      hardware: Profile of the machine.
      model: Card of the model.
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each request.
      expert_bytes: Bytes of one expert in each MoE layer; None takes the card's size everywhere.
      strategy: What runs beside every layer and may cost something; None costs nothing.

    Raises:
      UsageError: A count is out of range, or `expert_bytes` is not one positive size per layer.
      BadFileError: The profile lacks a constant.
    """
    constant = hardware.strategy_layer_s.get(strategy or "")
    return clock_from_parameters(
        from_hardware(hardware),
        model,
        batch_size=batch_size,
        context_tokens=context_tokens,
        expert_bytes=expert_bytes,
        strategy_layer_s=0.0 if constant is None else constant.value,
    )


def clock_from_parameters(
    parameters: CostParameters,
    model: ModelSpec,
    *,
    batch_size: int,
    context_tokens: int = 512,
    expert_bytes: Float[Array, " layers"] | np.ndarray | None = None,
    strategy_layer_s: Scalar = 0.0,
) -> LayerClock:
    """`layer_clock` as a differentiable function of the machine's constants.

    Raises:
      UsageError: A count is out of range, or `expert_bytes` is not one positive size per layer.
    """
    if batch_size < 1 or context_tokens < 0:
        raise UsageError(
            f"no clock for batch size {batch_size} and context {context_tokens}",
            "Use a batch size of at least 1 and a context of at least 0 tokens.",
        )
    sizes = _expert_sizes(model, expert_bytes)
    return traced_clock(
        parameters,
        model,
        sizes,
        batch_size=batch_size,
        context_tokens=context_tokens,
        strategy_layer_s=strategy_layer_s,
    )


def traced_clock(
    parameters: CostParameters,
    model: ModelSpec,
    expert_bytes: Float[Array, " layers"],
    *,
    batch_size: Scalar,
    context_tokens: Scalar,
    strategy_layer_s: Scalar = 0.0,
) -> LayerClock:
    """`clock_from_parameters` whose counts may be traced as well, and are not checked."""
    sizes = expert_bytes
    stream_bytes_per_s = parameters.vram_bytes_per_s * parameters.kernel_efficiency_ratio

    def dense_s(num_bytes: int, num_flops: int) -> Scalar:
        # Floats: large counts do not fit into the integers of a traced computation.
        read_s = float(num_bytes) / stream_bytes_per_s
        return smooth_maximum(read_s, batch_size * float(num_flops) / parameters.matmul_flops)

    kv_bytes = batch_size * context_tokens * (float(model.kv_bytes_per_token) / model.num_layers)
    attention_s = (
        dense_s(model.attention_bytes, model.attention_flops)
        + kv_bytes / stream_bytes_per_s
        + parameters.layer_fixed_s
        + jnp.where(jnp.asarray(batch_size) > 1, parameters.batched_layer_s, 0.0)
        + strategy_layer_s
    )
    step_s = parameters.step_fixed_s + dense_s(
        model.head_bytes, 2 * model.hidden_size * model.vocab_size
    )
    num_dense_layers = model.num_layers - model.num_moe_layers
    if num_dense_layers:
        ffn_params = model.expert_matrices * model.hidden_size * model.intermediate_size
        ffn_s = dense_s(model.stored_bytes(ffn_params), 2 * ffn_params)
        step_s = step_s + num_dense_layers * (attention_s + ffn_s)
    expert_copy_s = jnp.asarray(copy_s(parameters, sizes))
    return LayerClock(
        attention_s=jnp.asarray(attention_s, float),
        shared_s=jnp.asarray(dense_s(model.shared_expert_bytes, model.shared_expert_flops), float),
        expert_read_s=sizes / stream_bytes_per_s,
        expert_token_s=jnp.full_like(sizes, float(model.expert_flops)) / parameters.matmul_flops,
        copy_s=expert_copy_s,
        host_expert_s=jnp.asarray(host_expert_s(parameters, sizes)),
        step_fixed_s=jnp.asarray(step_s, float),
        overlap_ratio=jnp.asarray(parameters.overlap_ratio, float),
        shadow_copy_s=(1.0 - parameters.prefetch_overlap_ratio) * expert_copy_s,
        expert_bytes=sizes,
    )


def _expert_sizes(
    model: ModelSpec, expert_bytes: Float[Array, " layers"] | np.ndarray | None
) -> Float[Array, " layers"]:
    if expert_bytes is None:
        return jnp.full((model.num_moe_layers,), model.expert_bytes, float)
    sizes = np.asarray(expert_bytes, dtype=np.float64)
    if sizes.ndim != 1 or not sizes.size or not np.isfinite(sizes).all() or sizes.min() <= 0:
        raise UsageError(
            f"expert_bytes of shape {sizes.shape} is not one positive size per layer",
            "Give one number of bytes for every MoE layer, or leave it to the model card.",
        )
    return jnp.asarray(sizes, float)
