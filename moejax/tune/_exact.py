"""How good a split can be at best: exact search of the same predicted cost, without gradients.

The cost of a layer is convex and piecewise linear in its transfer time: the larger of two lines.
Along any line between the two, the three cuts of a layer's stack separate. With prices on the bytes
of the host tiers every layer can therefore be bounded for each count of device slots, and a dynamic
programme shares the device budget. Any prices and any lines give a lower bound on what is possible;
good prices are found by cutting planes on the Lagrangian dual. Where host memory is not scarce its
prices are 0 and the bound is the exact optimum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linprog

from ._problem import TierNumbers, TierProblem
from ._step import Objective, compute_s, saved_s, tie_bytes_per_s

_MAX_CUTS = 80
_GAP_RATIO = 1e-6
# Lines tried between the two, as shares of the second.
_MIXES = np.linspace(0.0, 1.0, 5)
# States of the dynamic programme where experts differ in size.
_MAX_STATES = 8192


class LayerLines(NamedTuple):
    """The objective of one layer as the larger of two lines in its transfer time.

    Attributes:
      intercept: Objective of each line without transfers, for every count of landing and retaining
        slots.
      slope: Objective per second of transfer.
      device: Transfer seconds a layer owes to its cut below the device, against slots.
      pinned: The same for the cut below pinned memory.
      pageable: The same for the cut below pageable memory.
      fixed: Objective that no split changes.
    """

    intercept: Float[np.ndarray, "lines layers landing slots"]
    slope: Float[np.ndarray, " lines"]
    device: Float[np.ndarray, "layers slots"]
    pinned: Float[np.ndarray, "layers slots"]
    pageable: Float[np.ndarray, "layers slots"]
    fixed: float


class Bound(NamedTuple):
    """A value no split within the budgets can beat.

    Attributes:
      value: Lower bound of the objective; the exact optimum where `prices` of the host are 0.
      device_slots: Device slots of each layer where the bound is taken.
      prices: Objective per byte of device, pinned and pageable memory.
    """

    value: float
    device_slots: Int[np.ndarray, " layers"]
    prices: Float[np.ndarray, "3"]


def layer_lines(problem: TierProblem, objective: Objective) -> LayerLines:
    """Tabulates the objective; p99 does not separate over layers and is not offered."""
    numbers = problem.numbers
    max_landing = int(numbers.max_landing)
    intercept_s, hidden_s, saved, num_fetched = (
        np.asarray(table, np.float64) for table in _tables(numbers, jnp.arange(max_landing + 1))
    )
    clock = numbers.clock
    overlap = float(clock.overlap_ratio)
    weight, fixed_bytes = 1.0, 0.0
    if objective == "bytes":
        weight = float(tie_bytes_per_s(numbers))
        fixed_bytes = num_fetched * np.asarray(clock.expert_bytes, np.float64)[:, None, None]
    # Where the wait is shorter than what can hide it, and where it is longer.
    lines = [intercept_s - (1 - overlap) * saved, intercept_s - saved - overlap * hidden_s]
    misses = np.asarray(numbers.num_misses, np.float64)
    link_s, pageable_s, store_s = (
        np.asarray(times, np.float64)[:, None]
        for times in (clock.copy_s, numbers.pageable_s, numbers.store_s)
    )
    return LayerLines(
        intercept=np.stack([weight * line + fixed_bytes for line in lines]),
        slope=weight * np.array([1 - overlap, 1.0]),
        device=misses * link_s,
        pinned=misses * (pageable_s - link_s),
        pageable=misses * (store_s - pageable_s),
        fixed=weight * float(clock.step_fixed_s),
    )


def optimum_bound(problem: TierProblem, objective: Objective) -> Bound:
    """The best any split of the budgets could do."""
    lines = layer_lines(problem, objective)
    budgets = np.asarray(problem.slot_budgets_bytes, np.float64)
    dual, prices = dual_optimum(problem, lines, budgets)
    value, device_slots = _share_device(problem, lines, prices)
    return Bound(max(value, dual), device_slots, prices)


def dual_optimum(
    problem: TierProblem, lines: LayerLines, budgets_bytes: Float[np.ndarray, "3"]
) -> tuple[float, Float[np.ndarray, "3"]]:
    """The Lagrangian bound and its prices, by Kelley's cutting planes.

    Convex and falling in the budgets, it also says what the next bytes of each tier are worth.

    Reference:
      Kelley, "The cutting-plane method for solving convex programs", 1960.
    """
    sizes = np.asarray(problem.expert_bytes, np.float64)
    nothing = lines.slope[-1] * (lines.device + lines.pinned + lines.pageable)[:, 0]
    # In units where a slot of the dearest layer costs at most about 1.
    unit = max(float(np.max((nothing + lines.intercept[0, :, 0, 0]) / sizes)), 1e-30)
    best_value, best_prices = -np.inf, np.zeros(3)
    rows, offsets = [], []
    prices = np.zeros(3)
    for _ in range(_MAX_CUTS):
        value, used_bytes = _priced(problem, lines, prices)
        value -= float(prices @ budgets_bytes)
        if value > best_value:
            best_value, best_prices = value, prices
        slope = used_bytes - budgets_bytes
        # Variables: prices in `unit`, and the height t <= value + slope . (new - prices).
        rows.append([*(-slope * unit), 1.0])
        offsets.append(value - float(slope @ prices))
        bounds = [(0.0, 2.0)] * 3 + [(None, None)]
        answer = linprog([0, 0, 0, -1.0], A_ub=rows, b_ub=offsets, bounds=bounds, method="highs")
        if not answer.success or -answer.fun - best_value <= _GAP_RATIO * abs(best_value):
            break
        prices = answer.x[:3] * unit
    return best_value, best_prices


def uniform_optimum(problem: TierProblem, objective: Objective) -> Int[np.ndarray, "4 layers"]:
    """The best split with equal slots in all layers, by trying every one.

    Returns:
      Retained, landing, pinned and pageable slots of every layer.
    """
    lines = layer_lines(problem, objective)
    total_bytes = sum(problem.expert_bytes)
    most = [min(problem.num_experts, b // total_bytes) for b in problem.slot_budgets_bytes]
    num_experts = problem.num_experts
    cuts = np.arange(num_experts + 1)
    best_value, best = np.inf, (0, 0, 0, 0)
    for landing in range(lines.intercept.shape[2]):
        for retained in range(max(0, most[0] - landing) + 1):
            if retained + landing > most[0]:
                continue
            pinned = cuts[retained : min(num_experts, retained + most[1]) + 1]
            is_within = (cuts >= pinned[:, None]) & (cuts <= pinned[:, None] + most[2])
            transfer_s = (
                lines.device[:, retained, None, None]
                + lines.pinned[:, pinned, None]
                + lines.pageable[:, None, :]
            )
            first, second = (
                intercept[:, None, None] + slope * transfer_s
                for intercept, slope in zip(
                    lines.intercept[:, :, landing, retained], lines.slope, strict=True
                )
            )
            totals = np.maximum(first, second).sum(axis=0)
            values = np.where(is_within, totals, np.inf)
            row, cut = np.unravel_index(np.argmin(values), values.shape)
            if values[row, cut] < best_value:
                best_value = values[row, cut]
                best = (retained, landing, pinned[row] - retained, cut - pinned[row])
    return np.repeat(np.array(best, np.int64)[:, None], problem.num_layers, axis=1)


@jax.jit
def _tables(
    numbers: TierNumbers, landing: Int[Array, " landing"]
) -> tuple[Float[Array, "layers landing slots"], ...]:
    """Time without transfers, what of it may hide them, time saved, and experts fetched."""

    def one(
        num_slots: Int[Array, ""], num_landing: Int[Array, ""]
    ) -> tuple[Float[Array, " layers"], ...]:
        num_misses = numbers.num_misses[:, num_slots]
        resident_s, arriving_s = compute_s(numbers, numbers.num_misses[:, 0], num_misses)
        num_prefetches = jnp.minimum(num_landing, num_misses)
        return (
            numbers.clock.attention_s + resident_s + arriving_s,
            numbers.any_miss_ratio[:, num_slots] * resident_s,
            saved_s(numbers, num_prefetches),
            num_misses + (1.0 - numbers.recall_ratio) * num_prefetches,
        )

    over_slots = jax.vmap(one, (0, None), -1)
    slots = jnp.arange(numbers.num_misses.shape[-1])
    return jax.vmap(over_slots, (None, 0), 1)(slots, landing)


def _priced(
    problem: TierProblem, lines: LayerLines, prices: Float[np.ndarray, "3"]
) -> tuple[float, Float[np.ndarray, "3"]]:
    """Sum of the layers' best priced objectives, and the bytes they take of each tier."""
    sizes = np.asarray(problem.expert_bytes, np.float64)
    mixed, pinned_cuts, pageable_cuts = _host_priced(lines, sizes, prices)
    best = mixed.max(axis=0)
    num_landing, num_slots = best.shape[1:]
    device_slots = np.arange(num_landing)[:, None] + np.arange(num_slots)
    best = best + prices[0] * sizes[:, None, None] * device_slots
    best = np.where(device_slots <= problem.num_experts, best, np.inf).reshape(len(sizes), -1)
    layers = np.arange(len(sizes))
    landing, retained = np.divmod(np.argmin(best, axis=1), num_slots)
    mix = np.argmax(mixed[:, layers, landing, retained], axis=0)
    pinned = pinned_cuts[mix, layers, retained]
    pageable = pageable_cuts[mix, layers, pinned]
    used = np.stack([retained + landing, pinned - retained, pageable - pinned])
    return float(best.min(axis=1).sum()) + lines.fixed, used @ sizes


def _host_priced(
    lines: LayerLines, sizes: Float[np.ndarray, " layers"], prices: Float[np.ndarray, "3"]
) -> tuple[
    Float[np.ndarray, "mixes layers landing slots"],
    Int[np.ndarray, "mixes layers slots"],
    Int[np.ndarray, "mixes layers slots"],
]:
    """Lower bound of each layer against its slots, host bytes paid at `prices`, and its cuts."""
    slots = np.arange(lines.device.shape[1])
    _, pinned_price, pageable_price = prices
    slope = (lines.slope[0] + _MIXES * (lines.slope[1] - lines.slope[0]))[:, None, None]
    slot_bytes = sizes[:, None] * slots
    below, pageable_cuts = _suffix_minimum(slope * lines.pageable + pageable_price * slot_bytes)
    here = slope * lines.pinned + (pinned_price - pageable_price) * slot_bytes + below
    lower, pinned_cuts = _suffix_minimum(here)
    own = slope * lines.device - pinned_price * slot_bytes + lower
    mixes = _MIXES[:, None, None, None]
    intercept = lines.intercept[0] + mixes * (lines.intercept[1] - lines.intercept[0])
    return intercept + own[:, :, None, :], pinned_cuts, pageable_cuts


def _suffix_minimum(
    values: Float[np.ndarray, "*batch slots"],
) -> tuple[Float[np.ndarray, "*batch slots"], Int[np.ndarray, "*batch slots"]]:
    """For each position the smallest value at or after it, and where it stands."""
    smallest = np.minimum.accumulate(values[..., ::-1], axis=-1)[..., ::-1]
    last = values.shape[-1] - 1
    stands = np.where(values == smallest, np.arange(last + 1), last)
    return smallest, np.minimum.accumulate(stands[..., ::-1], axis=-1)[..., ::-1]


def _share_device(
    problem: TierProblem, lines: LayerLines, prices: Float[np.ndarray, "3"]
) -> tuple[float, Int[np.ndarray, " layers"]]:
    """Dynamic programme over device bytes, host bytes paid at `prices`."""
    sizes = np.asarray(problem.expert_bytes, np.int64)
    values, _, _ = _host_priced(lines, sizes.astype(np.float64), prices)
    best = _by_device_slots(values.max(axis=0), problem.num_experts)
    total, device_slots = share_budget(best, sizes, problem.slot_budgets_bytes[0])
    budgets = np.asarray(problem.slot_budgets_bytes, np.float64)
    return float(total + lines.fixed - prices[1:] @ budgets[1:]), device_slots


def share_budget(
    costs: Float[np.ndarray, "layers slots"],
    sizes: Int[np.ndarray, " layers"],
    budget_bytes: int,
    *,
    fits: bool = False,
) -> tuple[float, Int[np.ndarray, " layers"]]:
    """The slots of each layer that cost least together, by dynamic programming over bytes.

    Args:
      costs: What a layer costs with 0, 1, ... slots.
      sizes: Bytes of one slot of each layer.
      budget_bytes: Bytes of all slots.
      fits: Where sizes differ so much that bytes are counted in coarse units: whether the slots
        must fit, or the cost must be a lower bound. Elsewhere both are so.

    Returns:
      The cost, and the slots.
    """
    budget_bytes = min(budget_bytes, int(sizes.sum()) * (costs.shape[1] - 1))
    unit_bytes = int(np.gcd.reduce(sizes))
    if unit_bytes < sizes.min():
        unit_bytes *= max(1, -(-budget_bytes // (unit_bytes * _MAX_STATES)))
    num_units = budget_bytes // unit_bytes

    def units(layer: int, slots: int) -> int:
        num_bytes = slots * int(sizes[layer])
        return -(-num_bytes // unit_bytes) if fits else num_bytes // unit_bytes

    total = np.zeros(num_units + 1)
    chosen = np.zeros((len(sizes), num_units + 1), np.int16)
    for layer, row in enumerate(costs):
        grown = np.full(num_units + 1, np.inf)
        for slots, cost in enumerate(row):
            offset = units(layer, slots)
            if offset > num_units:
                break
            candidate = total[: num_units + 1 - offset] + cost
            is_better = candidate < grown[offset:]
            grown[offset:][is_better] = candidate[is_better]
            chosen[layer, offset:][is_better] = slots
        total = grown
    best_slots = np.zeros(len(sizes), np.int64)
    left = num_units
    for layer in reversed(range(len(sizes))):
        best_slots[layer] = chosen[layer, left]
        left -= units(layer, int(best_slots[layer]))
    return float(total[num_units]), best_slots


def _by_device_slots(
    values: Float[np.ndarray, "layers landing slots"], num_experts: int
) -> Float[np.ndarray, "layers slots"]:
    """The best use of each count of device slots, retaining and landing together."""
    best = np.full((len(values), num_experts + 1), np.inf)
    for landing in range(min(values.shape[1], num_experts + 1)):
        retaining = values[:, landing, : num_experts + 1 - landing]
        best[:, landing:] = np.minimum(best[:, landing:], retaining)
    return best
