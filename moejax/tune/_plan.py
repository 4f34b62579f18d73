"""The answer: how many slots of each tier every layer gets, and what they are worth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.errors import UsageError
from moejax.units import format_bytes, format_ratio

from ._exact import dual_optimum, layer_lines, optimum_bound, uniform_optimum
from ._problem import TierProblem
from ._relaxed import relaxed_optimum
from ._rounding import WholeSplit, improve, round_down, tier_bytes, uniform_split
from ._step import Objective, Split, predict, split_objective

OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""What a plan may minimise: mean step latency, its 99th percentile, or bytes over the link."""

_MARGINAL_BYTES = 10**8
_TIERS = (("L1", "device"), ("L2", "pinned"), ("L3", "pageable"))
# Strategies whose larger cache always contains the smaller one; tiers cut one stack only for these.
_STACK_STRATEGIES = frozenset({"on_demand", "oracle", "top_k", "lru", "lfu"})
# Strategies that evict by recency and so thrash when a shared pool is smaller than one cycle.
_CYCLING_STRATEGIES = frozenset({"lru", "fifo", "multi_look", "intelligent", "gate_look"})
# The cost model is off by a few per cent; a predicted gain below this is no promise.
NOISE_RATIO = 0.02


@dataclass(frozen=True)
class TierPlan:
    """One memory tier of a plan.

    Attributes:
      name: `L1` (fastest) to `L3`.
      memory: `device`, `pinned` or `pageable`.
      capacity_bytes: Bytes of the slots below.
      experts_per_layer: Slots of each MoE layer; on the device landing slots count too.
    """

    name: str
    memory: str
    capacity_bytes: int
    experts_per_layer: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Tier sizes with their predicted worth.

    Attributes:
      budget_bytes: Device bytes as asked for.
      used_bytes: Device bytes used, dense weights and the like included where the budget has them.
      model: Card name of the model.
      hardware: Name of the hardware profile.
      strategy: Strategy the plan is for.
      objective: What was minimised.
      tiers: Fastest first.
      prefetch_slots_per_layer: Device slots of each layer kept free for prefetches to land in.
      prefetch_share_ratio: Those slots over all device slots.
      step_latency_s: Predicted mean time of a decode step.
      p99_latency_s: Predicted 99th percentile, of steps the plan was not tuned on; None without
        sample steps.
      hit_ratio: Predicted share of demands that find their expert on the device.
      fetched_bytes: Predicted bytes a step moves to the device.
      uniform_step_latency_s: The same budgets shared equally over the layers.
      uniform_p99_latency_s: The same for the percentile; None without sample steps.
      uniform_optimum_step_latency_s: Best of all equal splits, by trying every one.
      gain_over_uniform_ratio: Share of `uniform_step_latency_s` that the plan saves.
      optimum_gap_ratio: How far the plan is above the exact optimum of the same problem, at most.
      gradient_gap_ratio: The same for what gradient and rounding alone arrived at.
      marginals_s_per_100mb: Change of the step latency for the next 100 MB of each memory;
        negative saves time.
      warnings: What a reader should know before using the plan.
    """

    budget_bytes: int
    used_bytes: int
    model: str
    hardware: str
    strategy: str
    objective: str
    tiers: tuple[TierPlan, ...]
    prefetch_slots_per_layer: tuple[int, ...]
    prefetch_share_ratio: float
    step_latency_s: float
    p99_latency_s: float | None
    hit_ratio: float
    fetched_bytes: float
    uniform_step_latency_s: float
    uniform_p99_latency_s: float | None
    uniform_optimum_step_latency_s: float
    gain_over_uniform_ratio: float
    optimum_gap_ratio: float
    gradient_gap_ratio: float
    marginals_s_per_100mb: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def marginal_s_per_100mb(self) -> float:
        """Change of the step latency for the next 100 MB of device memory."""
        return self.marginals_s_per_100mb["device"]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain lists and numbers, as `tune-cache -o json` prints it."""
        return {
            "budget_bytes": self.budget_bytes,
            "used_bytes": self.used_bytes,
            "model": self.model,
            "hardware": self.hardware,
            "strategy": self.strategy,
            "objective": self.objective,
            "tiers": [
                {
                    "name": tier.name,
                    "memory": tier.memory,
                    "capacity_bytes": tier.capacity_bytes,
                    "experts_per_layer": list(tier.experts_per_layer),
                }
                for tier in self.tiers
            ],
            "prefetch_slots_per_layer": list(self.prefetch_slots_per_layer),
            "prefetch_share_ratio": self.prefetch_share_ratio,
            "step_latency_s": self.step_latency_s,
            "p99_latency_s": self.p99_latency_s,
            "hit_ratio": self.hit_ratio,
            "fetched_bytes": self.fetched_bytes,
            "uniform_step_latency_s": self.uniform_step_latency_s,
            "uniform_p99_latency_s": self.uniform_p99_latency_s,
            "uniform_optimum_step_latency_s": self.uniform_optimum_step_latency_s,
            "gain_over_uniform_ratio": self.gain_over_uniform_ratio,
            "optimum_gap_ratio": self.optimum_gap_ratio,
            "gradient_gap_ratio": self.gradient_gap_ratio,
            "marginal_s_per_100mb": self.marginal_s_per_100mb,
            "marginals_s_per_100mb": dict(self.marginals_s_per_100mb),
            "warnings": list(self.warnings),
        }


def tune(problem: TierProblem, objective: Objective = "latency", seed: int = 0) -> Plan:
    """Sizes every tier of every layer for the budgets of `problem`.

    Gradient descent from several starts gives fractional slots; the best is rounded down and
    improved by exchanges. Exchanges can stall on curves with cliffs, so the better uniform split
    and the device slots of the exact search are improved in the same way and the best of the three
    is the plan. In what it minimises it is never worse than uniform.

    Args:
      problem: Curves, clock and budgets.
      objective: One of `OBJECTIVES`.
      seed: Draws the starts; the same seed gives the same plan.

    Raises:
      UsageError: The objective is unknown, or p99 was asked for without sample steps.
    """
    if objective not in OBJECTIVES:
        raise UsageError(
            f"{objective!r} is no objective", f"Choose one of {', '.join(OBJECTIVES)}."
        )
    if objective == "p99" and problem.numbers.sample_misses is None:
        raise UsageError(
            "a 99th percentile needs the misses of single steps and only their mean was given",
            "Only the closed form of lru has them: use --strategy lru, or --objective latency.",
        )
    # A percentile does not add up over layers: there the exact search is of the mean.
    exact_objective: Objective = "latency" if objective == "p99" else objective
    bound = optimum_bound(problem, exact_objective)
    uniforms = (uniform_split(problem), uniform_optimum(problem, exact_objective))

    def value(split: WholeSplit) -> float:
        return _value(problem, split, objective)

    starts = (
        _rounded_descent(problem, objective, seed),
        min(uniforms, key=value),
        uniform_split(problem, bound.device_slots),
    )
    splits = [improve(problem, start, objective) for start in starts]
    gaps = [_value(problem, split, exact_objective) / bound.value - 1.0 for split in splits]
    best = min(range(len(splits)), key=lambda start: value(splits[start]))
    return _plan(problem, objective, splits[best], uniforms, gaps[best], gaps[0])


def _rounded_descent(problem: TierProblem, objective: Objective, seed: int) -> WholeSplit:
    numbers = problem.numbers
    if objective != "p99":
        # Unused samples would only be one more shape to compile for.
        numbers = numbers._replace(sample_misses=None)
    splits, values = relaxed_optimum(numbers, jax.random.key(seed), objective=objective)
    best = int(jnp.argmin(values))
    return round_down(Split(*(field[best] for field in splits)))


def _value(problem: TierProblem, split: WholeSplit, objective: Objective) -> float:
    return float(split_objective(problem.numbers, _as_split(split), objective=objective))


def _as_split(split: WholeSplit) -> Split:
    return Split(*jnp.asarray(split, jnp.float32))


def _plan(
    problem: TierProblem,
    objective: Objective,
    split: WholeSplit,
    uniforms: tuple[WholeSplit, WholeSplit],
    gap_ratio: float,
    gradient_gap_ratio: float,
) -> Plan:
    numbers = problem.numbers._replace(sample_misses=problem.check_misses)
    prediction, uniform, uniform_best = (
        predict(numbers, _as_split(one)) for one in (split, *uniforms)
    )
    uniform_s = float(uniform.step_latency_s)
    latency_s = float(prediction.step_latency_s)
    gain_ratio = 1.0 - latency_s / uniform_s
    device, landing = split[0] + split[1], split[1]
    used_bytes = tier_bytes(problem, split)
    tiers = tuple(
        TierPlan(name, memory, int(num_bytes), tuple(slots.tolist()))
        for (name, memory), num_bytes, slots in zip(
            _TIERS, used_bytes, (device, split[2], split[3]), strict=True
        )
    )
    return Plan(
        budget_bytes=problem.budget_bytes,
        used_bytes=problem.fixed_bytes + int(used_bytes[0]),
        model=problem.model,
        hardware=problem.hardware,
        strategy=problem.strategy,
        objective=objective,
        tiers=tiers,
        prefetch_slots_per_layer=tuple(landing.tolist()),
        prefetch_share_ratio=float(landing.sum() / max(1, device.sum())),
        step_latency_s=latency_s,
        p99_latency_s=_known(prediction.p99_latency_s),
        hit_ratio=float(prediction.hit_ratio),
        fetched_bytes=float(prediction.fetched_bytes),
        uniform_step_latency_s=uniform_s,
        uniform_p99_latency_s=_known(uniform.p99_latency_s),
        uniform_optimum_step_latency_s=float(uniform_best.step_latency_s),
        gain_over_uniform_ratio=gain_ratio,
        # The bound is float64, the prediction float32: below 0 is rounding.
        optimum_gap_ratio=max(0.0, gap_ratio),
        gradient_gap_ratio=max(0.0, gradient_gap_ratio),
        marginals_s_per_100mb=MappingProxyType(_marginals(problem)),
        warnings=tuple(_warnings(problem, objective, split, gain_ratio)),
    )


def _known(time_s: Array) -> float | None:
    return None if np.isnan(time_s) else float(time_s)


def _marginals(problem: TierProblem) -> dict[str, float]:
    lines = layer_lines(problem, "latency")
    budgets = np.asarray(problem.slot_budgets_bytes, np.float64)
    now_s, _ = dual_optimum(problem, lines, budgets)
    marginals = {}
    for tier, (_, memory) in enumerate(_TIERS):
        more_s, _ = dual_optimum(problem, lines, budgets + _MARGINAL_BYTES * np.eye(3)[tier])
        marginals[memory] = min(0.0, more_s - now_s)
    return marginals


def _warnings(
    problem: TierProblem, objective: Objective, split: WholeSplit, gain_ratio: float
) -> Iterator[str]:
    num_demands = np.asarray(problem.numbers.num_misses[:, 0], np.float64)
    device = split[0] + split[1]
    num_slots, num_experts = int(device.sum()), problem.num_layers * problem.num_experts
    if num_slots == num_experts:
        yield "Every expert fits on the device: there is nothing left to tune."
        return
    total_bytes = sum(problem.expert_bytes) * problem.num_experts
    if sum(tier_bytes(problem, split)) < total_bytes:
        yield (
            f"The tiers hold {format_bytes(float(sum(tier_bytes(problem, split))))} of "
            f"{format_bytes(total_bytes)} of experts; the rest is read from the store."
        )
    cycle_slots = int(num_demands.sum() - num_demands.max()) + 1
    if problem.strategy in _CYCLING_STRATEGIES and num_slots < cycle_slots:
        yield (
            f"{num_slots} slots must stay divided by layer: an LRU pool of fewer than "
            f"{cycle_slots} slots, one step's cycle through the layers, would never hit."
        )
    num_short = int(np.sum(split[0] < num_demands))
    if num_short:
        yield (
            f"{num_short} of {problem.num_layers} layers have fewer slots than experts demanded "
            "in one step; part of what they fetch is never kept."
        )
    if problem.strategy not in _STACK_STRATEGIES:
        yield (
            f"{problem.strategy} does not nest smaller caches in larger ones, so the tiers below "
            "the device are approximate."
        )
    if objective == "p99":
        num_steps = len(jnp.asarray(problem.check_misses))
        yield (
            f"The percentile is that of {num_steps} steps the plan was not tuned on; the gap to "
            "the optimum is that of the mean step latency."
        )
    if gain_ratio < 0:
        yield (
            f"The mean step is {format_ratio(-gain_ratio)} slower than with equal slots in every "
            f"layer: the plan minimises {objective}."
        )
    elif gain_ratio < NOISE_RATIO:
        yield (
            f"The gain over equal slots in every layer, {format_ratio(gain_ratio)}, is below what "
            f"the cost model can tell apart ({format_ratio(NOISE_RATIO)})."
        )
