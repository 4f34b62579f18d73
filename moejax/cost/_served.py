"""A decode step of which a stated share of demands hits: the closed form of what others publish.

A miss is copied over the link, or computed on the host while the device computes the hits. Counts
are means: with d demands of a layer and hit ratio h, every layer has h d hits and (1 - h) d misses.
"""

from typing import NamedTuple

import jax.numpy as jnp

from moejax.cards import Hardware, ModelSpec
from moejax.errors import UsageError

from ._clock import LayerClock, layer_clock
from ._compute import expert_compute_s
from ._estimate import expected_distinct_experts
from ._step import step_latency_s


class ServedStep(NamedTuple):
    """What a decode step is made of, in seconds.

    Attributes:
      layers_s: Attention, router, shared experts, head, and what no byte explains.
      experts_s: Routed experts that the device computes.
      misses_s: Waiting for misses, less what computing hides.
    """

    layers_s: float
    experts_s: float
    misses_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.layers_s + self.experts_s + self.misses_s


def served_step(
    hardware: Hardware,
    model: ModelSpec,
    hit_ratio: float,
    *,
    on_host: bool = False,
    batch_size: int = 1,
    context_tokens: int = 512,
) -> ServedStep:
    """Prices a step of `model` on `hardware` with the given share of hits.

    Args:
      hardware: Profile of the machine.
      model: Card of the model, as it is stored there.
      hit_ratio: Share of demanded experts that are on the device, 0 to 1.
      on_host: Whether the host computes the misses; otherwise they are copied from pinned memory.
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each.

    Raises:
      UsageError: A count or the ratio is out of range.
      BadFileError: The profile lacks a constant.
    """
    if not 0 <= hit_ratio <= 1:
        raise UsageError(f"a hit ratio of {hit_ratio} is none", "Give a share from 0 to 1.")
    clock = layer_clock(hardware, model, batch_size=batch_size, context_tokens=context_tokens)
    num_demands = expected_distinct_experts(model, batch_size)
    num_misses = (1.0 - hit_ratio) * num_demands
    num_computed = num_demands - num_misses if on_host else num_demands
    num_tokens = batch_size * model.num_experts_per_tok * num_computed / num_demands
    miss_s = clock.host_expert_s if on_host else clock.copy_s
    layers = jnp.ones(model.num_moe_layers)
    step_s = step_latency_s(
        clock,
        num_computed * layers,
        num_tokens * layers,
        num_misses * miss_s,
        num_arriving=(0.0 if on_host else num_misses) * layers,
    )
    layers_s = _layers_s(clock, model.num_moe_layers)
    experts_s = float(
        jnp.sum(
            expert_compute_s(clock.expert_read_s, clock.expert_token_s, num_computed, num_tokens)
        )
    )
    return ServedStep(layers_s, experts_s, float(step_s) - layers_s - experts_s)


def _layers_s(clock: LayerClock, num_layers: int) -> float:
    return float(num_layers * (clock.attention_s + clock.shared_s) + clock.step_fixed_s)
