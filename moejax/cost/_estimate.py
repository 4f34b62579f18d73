"""What arithmetic alone says about a model on a machine, before any trace is replayed."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax._types import Scalar
from moejax.cards import Hardware, ModelSpec

from ._clock import LayerClock, clock_from_parameters, layer_clock
from ._parameters import CostParameters
from ._step import step_latency_s
from ._uncertainty import prediction_interval

# Largest live float32 activations of one token, in multiples of the hidden size; decode programs
# measured on an H100 needed 0.6 MB for Qwen1.5-MoE, of which the logits are nearly all.
_ACTIVATION_WIDTHS = 16


class Estimate(NamedTuple):
    """Bounds of one decode step and the smallest budgets.

    Attributes:
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each.
      distinct_experts: Expected distinct experts of one layer and step under uniform routing.
      all_hit_step_s: One step with every demanded expert on the device.
      all_miss_step_s: One step with every demanded expert copied from pinned host memory.
      all_hit_tokens_per_s: Batch size over `all_hit_step_s`.
      all_miss_tokens_per_s: Batch size over `all_miss_step_s`.
      all_miss_bytes: Expert bytes copied in such a step.
      link_ceiling_tokens_per_s: The same bytes at full link bandwidth and nothing else.
      miss_s: One demand copy.
      routed_bytes: All routed experts.
      dense_bytes: Everything else.
      kv_bytes: KV caches of the batch.
      workspace_bytes: Activations and logits of one step.
      smallest_budget_bytes: Expert slots only: one staging expert.
      smallest_dense_budget_bytes: The same with dense weights, KV caches and workspace.
      cliff_slots: Slots below which an LRU pool shared by all layers never hits.
    """

    batch_size: int
    context_tokens: int
    distinct_experts: float
    all_hit_step_s: float
    all_miss_step_s: float
    all_hit_tokens_per_s: float
    all_miss_tokens_per_s: float
    all_miss_bytes: float
    link_ceiling_tokens_per_s: float
    miss_s: float
    routed_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    smallest_budget_bytes: int
    smallest_dense_budget_bytes: int
    cliff_slots: int


def estimate(
    hardware: Hardware, model: ModelSpec, *, batch_size: int = 1, context_tokens: int = 512
) -> Estimate:
    """Bounds of a decode step of `model` on `hardware`.

    Raises:
      UsageError: A count is out of range.
      BadFileError: The profile lacks a constant.
    """
    clock = layer_clock(hardware, model, batch_size=batch_size, context_tokens=context_tokens)
    distinct = expected_distinct_experts(model, batch_size)
    hit_s, miss_s = (
        float(_bound_s(clock, model, batch_size, miss_ratio)) for miss_ratio in (0.0, 1.0)
    )
    all_miss_bytes = model.num_moe_layers * distinct * model.expert_bytes
    link_s = all_miss_bytes / hardware.value("pinned_h2d_bytes_per_s")
    return Estimate(
        batch_size=batch_size,
        context_tokens=context_tokens,
        distinct_experts=distinct,
        all_hit_step_s=hit_s,
        all_miss_step_s=miss_s,
        all_hit_tokens_per_s=batch_size / hit_s,
        all_miss_tokens_per_s=batch_size / miss_s,
        all_miss_bytes=all_miss_bytes,
        link_ceiling_tokens_per_s=batch_size / link_s,
        miss_s=float(clock.copy_s[0]),
        routed_bytes=model.routed_bytes,
        dense_bytes=model.dense_bytes,
        kv_bytes=_kv_bytes(model, batch_size, context_tokens),
        workspace_bytes=workspace_bytes(model, batch_size),
        smallest_budget_bytes=smallest_budget_bytes(model),
        smallest_dense_budget_bytes=smallest_budget_bytes(
            model, include_dense=True, batch_size=batch_size, context_tokens=context_tokens
        ),
        cliff_slots=cliff_slots(model, batch_size),
    )


def estimate_intervals(
    hardware: Hardware, model: ModelSpec, *, batch_size: int = 1, context_tokens: int = 512
) -> dict[str, tuple[float, float] | None]:
    """What 90 % of measurements of both steps of `estimate` are to lie in.

    Returns:
      `all_hit_interval_s` and `all_miss_interval_s`; None if the profile does not say how sure it
      is.

    Raises:
      UsageError: A count is out of range.
      BadFileError: The profile lacks a constant.
    """

    def predicted_s(parameters: CostParameters, miss_ratio: float) -> Scalar:
        clock = clock_from_parameters(
            parameters, model, batch_size=batch_size, context_tokens=context_tokens
        )
        return _bound_s(clock, model, batch_size, miss_ratio)

    return {
        f"{name}_interval_s": prediction_interval(
            hardware, functools.partial(predicted_s, miss_ratio=miss_ratio)
        )
        for name, miss_ratio in (("all_hit", 0.0), ("all_miss", 1.0))
    }


def expected_distinct_experts(model: ModelSpec, batch_size: int) -> float:
    """Distinct experts that independent, uniformly routed tokens demand in one layer.

        E (1 - (1 - k / E)^B) = E - (E - k) (1 - k / E)^(B - 1)

    Real routing of concurrent requests is more alike, so this is an upper estimate.
    """
    num_idle = model.num_experts - model.num_experts_per_tok
    # The second form is exact for a batch of one.
    return model.num_experts - num_idle * (num_idle / model.num_experts) ** (batch_size - 1)


def cliff_slots(model: ModelSpec, batch_size: int = 1) -> int:
    """Slots that an LRU pool over all layers needs before it can hit at all.

    One step walks through all layers, so an expert comes back after (layers - 1) x distinct others:
    below (layers - 1) x distinct + 1 slots LRU has evicted it every time.
    """
    distinct = math.floor(expected_distinct_experts(model, batch_size))
    return (model.num_moe_layers - 1) * distinct + 1


def smallest_budget_bytes(
    model: ModelSpec,
    *,
    include_dense: bool = False,
    batch_size: int = 1,
    context_tokens: int = 512,
) -> int:
    """The smallest device budget a plan can be made for: one staging expert.

    With `include_dense` the dense weights, KV caches and workspace share the budget.
    """
    if not include_dense:
        return model.expert_bytes
    kv_bytes = _kv_bytes(model, batch_size, context_tokens)
    return model.expert_bytes + model.dense_bytes + kv_bytes + workspace_bytes(model, batch_size)


def workspace_bytes(model: ModelSpec, batch_size: int) -> int:
    """Device memory for float32 logits and activations of one decode step."""
    return 4 * batch_size * (model.vocab_size + _ACTIVATION_WIDTHS * model.hidden_size)


def _bound_s(
    clock: LayerClock, model: ModelSpec, batch_size: int, miss_ratio: float
) -> Float[Array, ""]:
    """A step of which every demanded expert hits (0) or misses (1)."""
    distinct = expected_distinct_experts(model, batch_size)
    num_experts = jnp.full((model.num_moe_layers,), distinct, jnp.float32)
    num_tokens = jnp.full_like(num_experts, float(batch_size * model.num_experts_per_tok))
    return step_latency_s(clock, num_experts, num_tokens, miss_ratio * num_experts * clock.copy_s)


def _kv_bytes(model: ModelSpec, batch_size: int, context_tokens: int) -> int:
    return batch_size * context_tokens * model.kv_bytes_per_token
