"""Fits a workload's parameters to published figures and says how near they come."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.special import expit, logit

from moejax.errors import UsageError
from moejax.trace import statistics

from ._curves import (
    first_touch_ratio,
    lfu_hit_ratio,
    lru_hit_ratio,
    oracle_hit_ratio,
    pinned_hit_ratio,
)
from ._make import make_trace
from ._workload import Figures, Workload

# A residual of this size costs twice its square: the worst point matters more than the mean.
_TOLERANCE_RATIO = 0.015
# Ranges are aimed at their inner three fifths, so that other requests stay inside too.
_RANGE_MARGIN = 0.2


def assess(
    workload: Workload, *, num_requests: int = 16, tokens_per_request: int = 512, seed: int
) -> Figures:
    """Measures on fresh requests every figure that the workload has a target for.

    `hit_ratio` and `hit_ratio_warm` are per-layer curves of single requests from an empty cache;
    the latter counts first touches as hits while a slot is free. `top_k` pins by the popularity in
    as many other requests.

    Raises:
      UsageError: The targets name a strategy or statistic that is not known here.
    """
    drawn = make_trace(
        workload, num_requests=2 * num_requests, tokens_per_request=tokens_per_request, seed=seed
    )
    experts = drawn.experts.reshape(2, num_requests, tokens_per_request, *drawn.experts.shape[1:])
    achieved: dict[str, Mapping[str, Any]] = {}
    for measure, wanted in workload.targets.items():
        if measure == "statistics":
            found = statistics(drawn)
            achieved[measure] = {name: float(getattr(found, name)) for name in wanted}
        else:
            free = first_touch_ratio(experts[1], workload.num_experts)
            achieved[measure] = {
                strategy: {
                    slots: float(ratio + free[slots] * (measure == "hit_ratio_warm"))
                    for slots, ratio in _hit_ratio(workload, strategy, experts, tuple(points))
                }
                for strategy, points in wanted.items()
            }
    return MappingProxyType(achieved)


def deviations(
    targets: Figures, achieved: Figures, *, margin: float = 0.0
) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Achieved less target of every figure, under its path of keys.

    A target range [lowest, highest] counts from its nearer end, 0 inside; `margin` is the share of
    its width by which both ends move in.
    """
    for measure, wanted in targets.items():
        for name, target in wanted.items():
            if isinstance(target, Mapping):
                for slots, ratio in target.items():
                    yield (measure, name, slots), achieved[measure][name][slots] - ratio
            else:
                lowest, highest = target
                inset = margin * (highest - lowest)
                value = achieved[measure][name]
                nearest = min(max(value, lowest + inset), highest - inset)
                yield (measure, name), value - nearest


def calibrate(
    workload: Workload,
    *,
    num_requests: int = 4,
    tokens_per_request: int = 512,
    seed: int = 0,
    max_rounds: int = 12,
) -> Workload:
    """Moves the `fitted` parameters until the figures come as near to their targets as they can.

    Damped Gauss-Newton with finite differences; every evaluation draws the same requests, so that
    differences come from the parameters alone.

    Returns:
      The workload with its new parameters; `achieved` is left as it was.

    Raises:
      UsageError: The workload has nothing to fit.
    """
    if not workload.fitted or not workload.targets:
        raise UsageError(
            f"the workload {workload.name!r} has nothing to fit",
            "Name parameters under `fitted` and figures under `targets` in its card.",
        )

    start = np.array([_to_free(name, workload.parameters[name]) for name in workload.fitted])

    # Around 1, because the solver's difference step is relative.
    def residuals(step: Float[np.ndarray, " parameters"]) -> Float[np.ndarray, " figures"]:
        tried = _with_point(workload, start + step - 1)
        achieved = assess(
            tried, num_requests=num_requests, tokens_per_request=tokens_per_request, seed=seed
        )
        found = dict(deviations(workload.targets, achieved, margin=_RANGE_MARGIN))
        misses = np.array(list(found.values()))
        num_alike = Counter(measure for measure, *_ in found)
        # Every measure weighs the same, however many points its curves have.
        weights = np.array([num_alike[measure] ** -0.5 for measure, *_ in found])
        shares = sum(value for name, value in tried.parameters.items() if name.endswith("_share"))
        misses *= weights * (1 + (misses / _TOLERANCE_RATIO) ** 2)
        return np.append(misses, 10 * max(0.0, shares - 1))

    found = least_squares(residuals, np.ones(len(start)), diff_step=0.05, max_nfev=max_rounds)
    return _with_point(workload, start + found.x - 1)


def _hit_ratio(
    workload: Workload, strategy: str, experts: np.ndarray, slots: tuple[int, ...]
) -> list[tuple[int, float]]:
    profile, tested = experts
    num_experts = workload.num_experts
    if strategy == "oracle":
        return list(zip(slots, oracle_hit_ratio(tested, num_experts, slots), strict=True))
    if strategy == "lru":
        curve = lru_hit_ratio(tested, num_experts)
    elif strategy == "lfu":
        curve = lfu_hit_ratio(tested, num_experts)
    elif strategy == "top_k":
        curve = pinned_hit_ratio(profile, tested, num_experts)
    else:
        raise UsageError(
            f"workload {workload.name!r} has a target for {strategy!r}",
            "Targets are known for lru, lfu, oracle and top_k.",
        )
    return [(count, curve[count]) for count in slots]


def _with_point(workload: Workload, point: Float[np.ndarray, " parameters"]) -> Workload:
    moved = {
        name: round(_from_free(name, value), 5)
        for name, value in zip(workload.fitted, point, strict=True)
    }
    return dataclasses.replace(
        workload, parameters=MappingProxyType({**workload.parameters, **moved})
    )


def _to_free(name: str, value: float) -> float:
    return math.log(value) if name == "popularity" else float(logit(value))


def _from_free(name: str, value: float) -> float:
    return math.exp(value) if name == "popularity" else float(expit(value))
