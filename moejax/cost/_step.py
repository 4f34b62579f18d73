"""Closed form of one layer event and of one decode step.

With c_res the time of the shared and the resident experts, c_arr that of the experts which had to
be fetched, and wait the time from knowing the demand to the last arrival, one event takes

    attention + c_res + c_arr + wait - theta x min(c_res, wait),

theta being the overlap of the machine. The timeline applies this to every event; the tuner
applies it to expected counts, which is exact when counts do not vary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax._types import Scalar

from ._clock import LayerClock
from ._compute import expert_compute_s


def event_s(
    attention_s: Scalar,
    resident_s: Scalar,
    arriving_s: Scalar,
    wait_s: Scalar,
    overlap_ratio: Scalar,
) -> Scalar:
    """Time of one (step, layer) event.

    Args:
      attention_s: Attention, router and fixed cost, before the demand is known.
      resident_s: Shared expert and experts already in their slots: may run while others arrive.
      arriving_s: Experts that were fetched: run after the last of them arrived.
      wait_s: From the moment the demand is known until the last arrival; 0 when all are there.
      overlap_ratio: Share of the shorter of `resident_s` and `wait_s` that is hidden.
    """
    hidden_s = overlap_ratio * jnp.minimum(resident_s, wait_s)
    return attention_s + resident_s + arriving_s + wait_s - hidden_s


def step_latency_s(
    clock: LayerClock,
    num_experts: Float[Array, " layers"],
    num_tokens: Float[Array, " layers"],
    transfer_s: Float[Array, " layers"],
    *,
    num_arriving: Float[Array, " layers"] | None = None,
) -> Float[Array, ""]:
    """Latency of one decode step with the given demand and transfer time in every layer.

    Args:
      clock: Times of one layer for this batch.
      num_experts: Distinct experts demanded in each layer; may be an expectation.
      num_tokens: (token, expert) pairs of each layer: batch size times top-k.
      transfer_s: Time that each layer waits for experts beyond the device.
      num_arriving: Demanded experts that are fetched; None takes as many as demand copies fit in
        `transfer_s`, which is exact for misses from pinned memory and an idle link.

    Returns:
      Sum of the events of all layers and the fixed cost of the step.
    """
    if num_arriving is None:
        num_arriving = transfer_s / clock.copy_s
    num_arriving = jnp.minimum(num_arriving, num_experts)
    num_resident = num_experts - num_arriving
    tokens_each = num_tokens / jnp.where(num_experts > 0, num_experts, 1.0)
    resident_s = clock.shared_s + expert_compute_s(
        clock.expert_read_s, clock.expert_token_s, num_resident, num_resident * tokens_each
    )
    arriving_s = expert_compute_s(
        clock.expert_read_s, clock.expert_token_s, num_arriving, num_arriving * tokens_each
    )
    layer_s = event_s(clock.attention_s, resident_s, arriving_s, transfer_s, clock.overlap_ratio)
    return jnp.sum(layer_s) + clock.step_fixed_s
