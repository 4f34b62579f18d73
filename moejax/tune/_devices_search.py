"""Slots of every device and layer that make the slowest device of each layer fastest.

The mean over steps of the larger of two times does not separate over devices, but against any
weights w >= 0 of the devices that add up to 1 in every step and layer

    mean max_d t_d  >=  mean sum_d w_d t_d,

and the right side does: a dynamic programme for each device gives its exact optimum, a bound that
no split beats. Good weights are found by playing the game for some rounds: the slots answer the
weights, and the weights follow the devices that were the slowest. The best split that was met is
then improved a device at a time, each time by the exact optimum beside the others.

Reference:
  Robinson, "An iterative method of solving a game", 1951.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ._devices_problem import DevicesProblem, DeviceTimes
from ._exact import share_budget

_NUM_ROUNDS = 60
# A change of less than this share of a step is rounding.
_TOLERANCE_RATIO = 1e-9

DeviceSlots = Int[np.ndarray, "devices layers"]
"""Slots of each device and layer."""


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
      slots: The best split.
      bound_s: Mean step latency that no split beats.
    """

    slots: DeviceSlots
    bound_s: float


def search(problem: DevicesProblem) -> Found:
    """The split with the lowest mean step latency that was found, and a bound on all others."""
    times = problem.times
    slots, bound_s = _played(problem)
    starts = [slots, uniform_slots(problem)]
    splits = [_improved(problem, start) for start in starts]
    return Found(min(splits, key=lambda one: mean_step_s(times, one)), bound_s + times.common_s)


def uniform_slots(problem: DevicesProblem) -> DeviceSlots:
    """The same number of slots for every layer; what is left over goes to the first layers."""
    sizes = problem.expert_bytes
    rows = []
    for share in problem.step_misses:
        slots, left_bytes = np.zeros(len(sizes), np.int64), problem.slot_budget_bytes
        for _ in range(share.shape[-1] - 1):
            for layer, size_bytes in enumerate(sizes):
                if size_bytes <= left_bytes:
                    slots[layer] += 1
                    left_bytes -= size_bytes
        rows.append(slots)
    return np.stack(rows)


def step_times(times: DeviceTimes, slots: DeviceSlots) -> Float[np.ndarray, " steps"]:
    """Latency of every counted step: in each layer the slowest device counts."""
    return _own(times, slots).max(axis=0).sum(axis=-1) + times.common_s


def mean_step_s(times: DeviceTimes, slots: DeviceSlots) -> float:
    """Mean of `step_times`."""
    return float(step_times(times, slots).mean())


def _own(times: DeviceTimes, slots: DeviceSlots) -> Float[np.ndarray, "devices steps layers"]:
    layers = np.arange(slots.shape[1])
    return np.stack([own[:, layers, row] for own, row in zip(times.own_s, slots, strict=True)])


def _played(problem: DevicesProblem) -> tuple[DeviceSlots, float]:
    """The best split met, and the highest bound of its devices' own times."""
    times = problem.times
    num_devices, (num_steps, num_layers, _) = len(times.own_s), times.own_s[0].shape
    weights = np.full((num_devices, num_steps, num_layers), 1.0 / num_devices)
    best, best_s, bound_s = uniform_slots(problem), np.inf, 0.0
    for number in range(_NUM_ROUNDS if num_devices > 1 else 1):
        values, rows = zip(
            *(
                _cheapest(problem, np.einsum("sl,slc->lc", weight, own) / num_steps)
                for weight, own in zip(weights, times.own_s, strict=True)
            ),
            strict=True,
        )
        bound_s = max(bound_s, sum(values))
        slots = np.stack(rows)
        mean_s = mean_step_s(times, slots)
        if mean_s < best_s:
            best, best_s = slots, mean_s
        own_s = _own(times, slots)
        slowest = (own_s == own_s.max(axis=0)).astype(np.float64)
        slowest /= slowest.sum(axis=0)
        weights += (slowest - weights) / (number + 2)
    return best, bound_s


def _improved(problem: DevicesProblem, slots: DeviceSlots) -> DeviceSlots:
    """One device after another gets its best slots beside the others', while that helps."""
    times, slots = problem.times, slots.copy()
    now_s = mean_step_s(times, slots)
    while True:
        for device, own in enumerate(times.own_s):
            others = np.delete(_own(times, slots), device, axis=0)
            least_s = others.max(axis=0)[..., None] if len(others) else 0.0
            slots[device] = _cheapest(problem, np.maximum(own, least_s).mean(axis=0))[1]
        before_s, now_s = now_s, mean_step_s(times, slots)
        if before_s - now_s <= _TOLERANCE_RATIO * before_s:
            return slots


def _cheapest(
    problem: DevicesProblem, costs_s: Float[np.ndarray, "layers slots"]
) -> tuple[float, Int[np.ndarray, " layers"]]:
    """A cost that none beats, and slots that fit; those of that cost where sizes are alike."""
    sizes = np.asarray(problem.expert_bytes, np.int64)
    budget_bytes = problem.slot_budget_bytes
    value_s, slots = share_budget(costs_s, sizes, budget_bytes, fits=True)
    if np.ptp(sizes):
        value_s, _ = share_budget(costs_s, sizes, budget_bytes)
    return value_s, slots
