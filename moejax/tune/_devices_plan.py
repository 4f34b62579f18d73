"""The answer for several devices: slots of each layer on every device, and what they are worth."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moejax.units import format_ratio, format_seconds

from ._devices_problem import DevicesProblem
from ._devices_search import best_slots, devices_step_s, step_times, uniform_slots
from ._plan import NOISE_RATIO, TierPlan
from ._step import P99

_EXAMPLE_S = 1e-5


@dataclass(frozen=True)
class DevicesPlan:
    """Slots of each layer, the same on every device, with their predicted worth.

    Attributes:
      num_devices: Devices that the experts are dealt out among.
      budget_bytes: Bytes of each device as asked for.
      used_bytes: Bytes used of each, dense weights and the like included where the budget has them.
      model: Card name of the model.
      hardware: Name of the hardware profile.
      strategy: Strategy the plan is for.
      tiers: The slots of one device; what has none waits in pinned memory.
      step_latency_s: Predicted mean time of a decode step.
      p99_latency_s: Predicted 99th percentile, of the same steps.
      hit_ratio: Predicted share of demands that find their expert on its device.
      fetched_bytes: Predicted bytes that a step moves to all devices.
      all_reduce_s: What adding up the devices' answers takes, once a layer.
      uniform_step_latency_s: The same budgets shared equally over the layers.
      gain_over_uniform_ratio: Share of `uniform_step_latency_s` that the plan saves.
      links_and_memories_s: What the bytes of a step take: hits read from the memories and misses
        copied by the links, all devices sharing them equally at full rates; added up.
      one_device_step_latency_s: Predicted of one device with the same budget.
      speedup_ratio: That over `step_latency_s`.
      warnings: What a reader should know before using the plan.
    """

    num_devices: int
    budget_bytes: int
    used_bytes: int
    model: str
    hardware: str
    strategy: str
    tiers: tuple[TierPlan, ...]
    step_latency_s: float
    p99_latency_s: float
    hit_ratio: float
    fetched_bytes: float
    all_reduce_s: float
    uniform_step_latency_s: float
    gain_over_uniform_ratio: float
    links_and_memories_s: float
    one_device_step_latency_s: float
    speedup_ratio: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain lists and numbers, as `tune-cache -o json` prints it.

        `slots_per_device` says the slots of each device, which are all alike.
        """
        slots = self.tiers[0].experts_per_layer
        return asdict(self) | {"slots_per_device": [list(slots)] * self.num_devices}


def tune_devices(problem: DevicesProblem, one_device_step_latency_s: float) -> DevicesPlan:
    """Shares each device's budget among its layers so that the mean step is fastest.

    Args:
      problem: Times, misses and budgets.
      one_device_step_latency_s: What one device is predicted to take with the same budget.

    Returns:
      The exact optimum of the counted steps where experts are of one size; with the same slots on
      every device.
    """
    slots, times = best_slots(problem), problem.times
    latency_s, uniform_s = (devices_step_s(times, one) for one in (slots, uniform_slots(problem)))
    num_demands, num_misses = _counts(problem, slots)
    sizes = np.asarray(problem.expert_bytes)
    gain_ratio = 1.0 - latency_s / uniform_s
    return DevicesPlan(
        num_devices=problem.num_devices,
        budget_bytes=problem.budget_bytes,
        used_bytes=problem.fixed_bytes + int(slots @ sizes),
        model=problem.model,
        hardware=problem.hardware,
        strategy=problem.strategy,
        tiers=(TierPlan("L1", "device", int(slots @ sizes), tuple(slots.tolist())),),
        step_latency_s=latency_s,
        p99_latency_s=float(np.quantile(step_times(times, slots), P99)),
        hit_ratio=float(1.0 - num_misses.sum() / max(num_demands.sum(), 1e-9)),
        fetched_bytes=float(num_misses @ sizes),
        all_reduce_s=times.all_reduce_s,
        uniform_step_latency_s=uniform_s,
        gain_over_uniform_ratio=gain_ratio,
        links_and_memories_s=_links_and_memories_s(
            problem, float((num_demands - num_misses) @ sizes), float(num_misses @ sizes)
        ),
        one_device_step_latency_s=one_device_step_latency_s,
        speedup_ratio=one_device_step_latency_s / latency_s,
        warnings=tuple(_warnings(problem, slots, gain_ratio)),
    )


def _counts(
    problem: DevicesProblem, slots: Int[np.ndarray, " layers"]
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, " layers"]]:
    """Mean demands and misses of a step in each layer, over all devices."""
    layers = np.arange(problem.num_layers)
    num_demands, num_misses = np.zeros(len(layers)), np.zeros(len(layers))
    for share in problem.step_misses:
        num_demands += share[..., 0].mean(axis=0)
        num_misses += share[:, layers, np.minimum(slots, share.shape[-1] - 1)].mean(axis=0)
    return num_demands, num_misses


def _links_and_memories_s(
    problem: DevicesProblem, resident_bytes: float, fetched_bytes: float
) -> float:
    rates, num_devices = problem.rates, problem.num_devices
    read_bytes = rates.replicated_bytes + resident_bytes / num_devices
    link_s = fetched_bytes / num_devices / rates.link_bytes_per_s
    return read_bytes / rates.vram_bytes_per_s + link_s


def _warnings(
    problem: DevicesProblem, slots: Int[np.ndarray, " layers"], gain_ratio: float
) -> Iterator[str]:
    if not problem.knows_all_reduce:
        added_s = problem.num_layers * _EXAMPLE_S
        yield (
            f"The profile {problem.hardware} does not say what an all-reduce takes: it is taken as "
            f"0. Every {format_seconds(_EXAMPLE_S)} of it add {format_seconds(added_s)} to a step."
        )
    if not problem.knows_links:
        yield (
            f"The profile {problem.hardware} does not say how fast links are side by side: each is "
            "taken to run at full speed, although they share the host's memory."
        )
    if np.all(slots == problem.most_slots):
        yield "Every expert fits on its device: there is nothing left to tune."
    elif gain_ratio < NOISE_RATIO:
        yield (
            f"The gain over equal slots in every layer, {format_ratio(gain_ratio)}, is below what "
            f"the cost model can tell apart ({format_ratio(NOISE_RATIO)})."
        )
