"""The tuning question of several devices: what each takes for its own experts, step by step.

Experts are dealt out among D devices (`moejax.trace.share_of`); each has slots and a link of its
own. All of them compute attention, router and shared expert. In each layer of a step

  own           o    = c_res + c_arr + wait - overlap * min(c_res, wait)
  layer         t    = attention + max over devices o + all-reduce

where a device waits for its own misses alone and computes its own experts, the shared one included.
A mean of the misses does not tell a mean of the maximum, so the steps are counted one by one. What
has no slot waits in pinned memory, and nothing is prefetched. The links run side by side, at the
share of their bandwidth that the profile says is left then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.cards import Hardware, ModelSpec
from moejax.cost import (
    BetweenDevices,
    LayerClock,
    all_reduce_s,
    between_devices,
    clock_from_parameters,
    event_s,
    expert_compute_s,
    from_hardware,
)
from moejax.errors import InfeasibleBudgetError, UsageError
from moejax.units import format_bytes

from ._problem import DEFAULT_PINNED_BYTES, check_feasible, fixed_device_bytes

_MOST_STEPS = 1024


class DeviceTimes(NamedTuple):
    """What the prediction of a step depends on, in seconds.

    Attributes:
      own_s: Of each device, what its own experts take in each step and layer against its slots,
        waiting included.
      replicated_s: Of one layer, what every device does before it knows its demand.
      all_reduce_s: Of one layer, adding up what the devices' experts answer.
      step_fixed_s: Of a step, whatever the slots.
    """

    own_s: tuple[Float[np.ndarray, "steps layers slots"], ...]
    replicated_s: float
    all_reduce_s: float
    step_fixed_s: float

    @property
    def common_s(self) -> float:
        """What a step takes beside the devices' own experts."""
        num_layers = self.own_s[0].shape[1]
        return num_layers * (self.replicated_s + self.all_reduce_s) + self.step_fixed_s


class DeviceRates(NamedTuple):
    """What bounds a step by its bytes.

    Attributes:
      replicated_bytes: Weights and KV caches that every device reads in a step.
      vram_bytes_per_s: Rate of each device's memory.
      link_bytes_per_s: Rate of each device's link.
    """

    replicated_bytes: int
    vram_bytes_per_s: float
    link_bytes_per_s: float


@dataclass(frozen=True)
class DevicesProblem:
    """A tuning question for several devices, with the names that its answer repeats.

    Attributes:
      times: What the prediction depends on.
      step_misses: Of each device, the misses that the times are of.
      model: Card name of the model.
      hardware: Name of the hardware profile.
      knows_all_reduce: Whether that profile states what an all-reduce takes.
      knows_links: Whether it states what links are worth side by side.
      strategy: Strategy whose misses these are.
      expert_bytes: Bytes of one expert of each layer.
      budget_bytes: Bytes of each device as asked for.
      fixed_bytes: Bytes of each device that are no slots; 0 when the budget counts slots only.
      rates: What bounds a step by its bytes.
    """

    times: DeviceTimes
    step_misses: tuple[Int[np.ndarray, "steps layers slots"], ...]
    model: str
    hardware: str
    knows_all_reduce: bool
    knows_links: bool
    strategy: str
    expert_bytes: tuple[int, ...]
    budget_bytes: int
    fixed_bytes: int
    rates: DeviceRates

    @property
    def num_devices(self) -> int:
        """Devices that the experts are dealt out among."""
        return len(self.step_misses)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.expert_bytes)

    @property
    def most_slots(self) -> int:
        """Experts of one layer on the device that owns most of them."""
        return max(share.shape[-1] for share in self.step_misses) - 1

    @property
    def slot_budget_bytes(self) -> int:
        """What is left for slots on each device."""
        return self.budget_bytes - self.fixed_bytes


def devices_problem(
    hardware: Hardware,
    model: ModelSpec,
    step_misses: Sequence[Int[np.ndarray, "steps layers slots"]],
    *,
    budget_bytes: int,
    pinned_budget_bytes: int = DEFAULT_PINNED_BYTES,
    strategy: str = "lru",
    batch_size: int = 1,
    context_tokens: int = 512,
    expert_bytes: Sequence[int] | None = None,
    include_dense: bool = False,
) -> DevicesProblem:
    """States the tuning question for one strategy on several devices of one kind.

    Args:
      hardware: Profile of one device and its link, and of an all-reduce.
      model: Card of the model.
      step_misses: Of each device, the misses of single steps of its share with 0, 1, ... slots.
      budget_bytes: Bytes of each device.
      pinned_budget_bytes: Pinned bytes of the host for what has no slot.
      strategy: Name of the strategy whose misses these are.
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each request.
      expert_bytes: Bytes of one expert of each layer; by default those of the card.
      include_dense: Whether dense weights, KV cache, workspace and one staging expert are paid
        from `budget_bytes` too; every device has its own.

    Raises:
      UsageError: The misses are not of this model.
      InfeasibleBudgetError: A budget holds not even the smallest plan.
    """
    _check_shares(model, step_misses)
    chosen = np.linspace(0, len(step_misses[0]) - 1, min(len(step_misses[0]), _MOST_STEPS))
    steps = tuple(share[chosen.round().astype(int)] for share in step_misses)
    sizes = tuple(expert_bytes or [model.expert_bytes] * model.num_moe_layers)
    fixed_bytes = 0
    if include_dense:
        fixed_bytes = fixed_device_bytes(model, batch_size, context_tokens, max(sizes))
    check_feasible(budget_bytes, fixed_bytes, max(sizes))
    _check_pinned(sizes, model, budget_bytes - fixed_bytes, pinned_budget_bytes, len(steps))
    parameters = from_hardware(hardware)
    between = BetweenDevices() if len(steps) == 1 else between_devices(hardware)
    link_bytes_per_s = parameters.pinned_h2d_bytes_per_s * between.links_beside_ratio
    layer_constant = hardware.strategy_layer_s.get(strategy)
    clock = clock_from_parameters(
        parameters._replace(pinned_h2d_bytes_per_s=link_bytes_per_s),
        model,
        batch_size=batch_size,
        context_tokens=context_tokens,
        expert_bytes=np.asarray(sizes),
        strategy_layer_s=0.0 if layer_constant is None else layer_constant.value,
    )
    times = DeviceTimes(
        own_s=own_times(clock, steps, float(batch_size * model.num_experts_per_tok)),
        replicated_s=float(clock.attention_s),
        all_reduce_s=float(all_reduce_s(between, model, batch_size)),
        step_fixed_s=float(clock.step_fixed_s),
    )
    kv_bytes = batch_size * context_tokens * model.kv_bytes_per_token
    embedding_bytes = 0 if model.tie_word_embeddings else model.head_bytes
    return DevicesProblem(
        times=times,
        step_misses=steps,
        model=model.name,
        hardware=hardware.name,
        knows_all_reduce="all_reduce_latency_s" in hardware.constants,
        knows_links="links_beside_ratio" in hardware.constants,
        strategy=strategy,
        expert_bytes=sizes,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        rates=DeviceRates(
            replicated_bytes=model.dense_bytes - embedding_bytes + kv_bytes,
            vram_bytes_per_s=hardware.value("vram_bytes_per_s"),
            link_bytes_per_s=float(link_bytes_per_s),
        ),
    )


def own_times(
    clock: LayerClock,
    step_misses: Sequence[Int[np.ndarray, "steps layers slots"]],
    num_tokens: float,
) -> tuple[Float[np.ndarray, "steps layers slots"], ...]:
    """What each device's own experts take in every step, waiting for its link included.

    Args:
      clock: Times of one layer.
      step_misses: Misses of each device against its slots; with none it misses all demands.
      num_tokens: (token, expert) pairs of a step and layer, over all devices.
    """
    num_demands = sum(share[..., :1] for share in step_misses)
    tokens_each = num_tokens / np.maximum(num_demands, 1)
    read_s, token_s, copy_s = (
        jnp.asarray(times)[None, :, None]
        for times in (clock.expert_read_s, clock.expert_token_s, clock.copy_s)
    )

    def experts_s(num_experts: Array) -> Array:
        num_pairs = jnp.asarray(tokens_each) * num_experts
        return jnp.asarray(expert_compute_s(read_s, token_s, num_experts, num_pairs))

    def own_s(share: np.ndarray) -> np.ndarray:
        num_misses = jnp.asarray(share, float)
        resident_s = clock.shared_s + experts_s(num_misses[..., :1] - num_misses)
        wait_s = num_misses * copy_s
        found = event_s(0.0, resident_s, experts_s(num_misses), wait_s, clock.overlap_ratio)
        return np.asarray(found, np.float64)

    return tuple(own_s(share) for share in step_misses)


def _check_shares(
    model: ModelSpec, step_misses: Sequence[Int[np.ndarray, "steps layers slots"]]
) -> None:
    num_devices = len(step_misses)
    expected = [
        (
            len(step_misses[0]),
            model.num_moe_layers,
            1 + len(range(device, model.num_experts, num_devices)),
        )
        for device in range(num_devices)
    ]
    found = [share.shape for share in step_misses]
    if found != expected or not len(step_misses[0]):
        raise UsageError(
            f"misses of shapes {found} are not those of {model.name} on {num_devices} devices",
            f"Their shapes should be {expected}, with at least one step.",
        )


def _check_pinned(
    sizes: Sequence[int],
    model: ModelSpec,
    slot_bytes: int,
    pinned_budget_bytes: int,
    num_devices: int,
) -> None:
    slots_bytes = slot_bytes // max(sizes) * max(sizes)
    waiting_bytes = max(0, sum(sizes) * model.num_experts - num_devices * slots_bytes)
    if waiting_bytes > pinned_budget_bytes:
        raise InfeasibleBudgetError(
            f"{format_bytes(waiting_bytes)} of experts have no slot on {num_devices} devices and "
            f"exceed the pinned budget of {format_bytes(pinned_budget_bytes)}",
            f"The smallest feasible --pinned-budget is {waiting_bytes}B; other host memory is not "
            "planned for several devices.",
        )
