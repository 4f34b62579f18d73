"""The closed form of a decode step whose counts are known: what prices a rank simulation.

Counts are sums over the layers of a step, D demands, M misses, T late experts and S copies beside
layers, taken to be spread over L layers as if each demand missed by itself. With d = D / L demands
of a layer, p = (M + T) / D, and A = 1 - (1 - p)^d the share of layers that wait for the link,

    copies   (M + T / 2) copy + S shadow - theta x A L x min(c_res, wait),

where c_res and wait are those of a layer that waits, and a late expert is taken to be half there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax._types import Scalar
from moejax.cards import ModelSpec

from ._clock import LayerClock, traced_clock
from ._compute import expert_compute_s
from ._parameters import CostParameters

_LATE_RATIO = 0.5


class StepCounts(NamedTuple):
    """What a decode step moves and computes, sums over its layers; may be means over steps.

    Attributes:
      num_demands: Distinct experts demanded: hits, late and misses.
      num_misses: Demanded experts that were absent.
      num_late: Demanded experts whose prefetch was under way.
      num_shadowed: Copies that ran beside layers, such as prefetches; parts of one count.
    """

    num_demands: Scalar
    num_misses: Scalar
    num_late: Scalar = 0.0
    num_shadowed: Scalar = 0.0


class StepParts(NamedTuple):
    """What a decode step is made of, in seconds.

    Attributes:
      copy_s: Waiting for copies, less what computing hides, and what prefetches slow it by.
      experts_s: Routed experts, each read once.
      layers_s: All else: attention, router, shared experts, head, and what no byte explains.
    """

    copy_s: Float[Array, ""]
    experts_s: Float[Array, ""]
    layers_s: Float[Array, ""]

    @property
    def step_s(self) -> Float[Array, ""]:
        """The whole step."""
        return self.copy_s + self.experts_s + self.layers_s


def counted_step(clock: LayerClock, counts: StepCounts, *, num_tokens: Scalar) -> StepParts:
    """Prices the counts of one step.

    Args:
      clock: Times of one layer for this batch.
      counts: Sums over the layers.
      num_tokens: (token, expert) pairs of a layer: batch size times top-k.
    """
    num_layers = len(clock.expert_bytes)
    read_s, token_s = jnp.mean(clock.expert_read_s), jnp.mean(clock.expert_token_s)
    num_demands = counts.num_demands / num_layers
    tokens_each = num_tokens / jnp.maximum(num_demands, 1e-9)
    num_absent = (counts.num_misses + counts.num_late) / num_layers
    miss_ratio = jnp.clip(num_absent / jnp.maximum(num_demands, 1e-9), 0.0, 1.0)
    all_hit_ratio = (1.0 - miss_ratio) ** num_demands
    wait_ratio = jnp.maximum(1.0 - all_hit_ratio, 1e-9)
    num_resident = (num_demands - num_absent - num_demands * all_hit_ratio) / wait_ratio
    num_resident = jnp.clip(num_resident, 0.0, num_demands)
    resident_s = clock.shared_s + expert_compute_s(
        read_s, token_s, num_resident, num_resident * tokens_each
    )
    copy_s = jnp.mean(clock.copy_s)
    num_copies = (counts.num_misses + _LATE_RATIO * counts.num_late) / num_layers
    wait_s = num_copies * copy_s
    hidden_s = clock.overlap_ratio * wait_ratio * jnp.minimum(resident_s, wait_s / wait_ratio)
    shadow_s = counts.num_shadowed * jnp.mean(clock.shadow_copy_s)
    return StepParts(
        copy_s=num_layers * (wait_s - hidden_s) + shadow_s,
        experts_s=jnp.asarray(
            num_layers * expert_compute_s(read_s, token_s, num_demands, num_tokens)
        ),
        layers_s=num_layers * (clock.attention_s + clock.shared_s) + clock.step_fixed_s,
    )


def counted_case(
    parameters: CostParameters,
    model: ModelSpec,
    counts: StepCounts,
    *,
    batch_size: Scalar,
    context_tokens: Scalar,
    strategy_layer_s: Scalar = 0.0,
) -> StepParts:
    """`counted_step` of a model on a machine; every argument but the model may be traced."""
    clock = traced_clock(
        parameters,
        model,
        jnp.full(model.num_moe_layers, float(model.expert_bytes)),
        batch_size=batch_size,
        context_tokens=context_tokens,
        strategy_layer_s=strategy_layer_s,
    )
    return counted_step(clock, counts, num_tokens=batch_size * model.num_experts_per_tok)
