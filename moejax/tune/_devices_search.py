"""The slots of each layer that make the slowest device fastest, the same on every device.

With c slots of a layer on every device, the mean over steps of the larger of their times depends on
c alone, and a step is the sum over its layers: a dynamic programme over the budget finds the exact
optimum of the counted steps.
"""

import numpy as np
from jaxtyping import Float, Int

from ._devices_problem import DevicesProblem, DeviceTimes
from ._exact import share_budget


def best_slots(problem: DevicesProblem) -> Int[np.ndarray, " layers"]:
    """Slots of each layer on every device, with the lowest mean step latency."""
    costs_s = _slowest_s(problem.times).mean(axis=0)
    sizes = np.asarray(problem.expert_bytes, np.int64)
    return share_budget(costs_s, sizes, problem.slot_budget_bytes, fits=True)[1]


def uniform_slots(problem: DevicesProblem) -> Int[np.ndarray, " layers"]:
    """The same number of slots for every layer; what is left over goes to the first layers."""
    sizes = problem.expert_bytes
    slots, left_bytes = np.zeros(len(sizes), np.int64), problem.slot_budget_bytes
    for _ in range(problem.most_slots):
        for layer, size_bytes in enumerate(sizes):
            if size_bytes <= left_bytes:
                slots[layer] += 1
                left_bytes -= size_bytes
    return slots


def step_times(
    times: DeviceTimes, slots: Int[np.ndarray, " layers"]
) -> Float[np.ndarray, " steps"]:
    """Latency of every counted step: in each layer the slowest device counts."""
    layers = np.arange(len(slots))
    return _slowest_s(times)[:, layers, slots].sum(axis=-1) + times.common_s


def devices_step_s(times: DeviceTimes, slots: Int[np.ndarray, " layers"]) -> float:
    """Mean of `step_times`."""
    return float(step_times(times, slots).mean())


def _slowest_s(times: DeviceTimes) -> Float[np.ndarray, "steps layers slots"]:
    """Against slots; a device that owns fewer experts leaves the rest of its slots empty."""
    num_slots = max(own.shape[-1] for own in times.own_s)
    wide = [
        np.pad(own, ((0, 0), (0, 0), (0, num_slots - own.shape[-1])), mode="edge")
        for own in times.own_s
    ]
    return np.max(wide, axis=0)
