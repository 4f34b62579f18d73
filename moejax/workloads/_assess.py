"""Measures the figures that a workload has targets for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from moejax.errors import UsageError
from moejax.trace import Trace, batch_trace, statistics

from ._curves import (
    as_one_layer,
    first_touch_ratio,
    lfu_hit_ratio,
    lru_hit_ratio,
    oracle_hit_ratio,
    pinned_hit_ratio,
)
from ._make import make_trace
from ._workload import Figures, Workload


def assess(
    workload: Workload, *, num_requests: int = 16, tokens_per_request: int = 512, seed: int
) -> Figures:
    """Measures on fresh requests every figure that the workload has a target for.

    `hit_ratio` and `hit_ratio_warm` are per-layer curves of single requests from an empty cache;
    the latter counts first touches as hits while a slot is free. `top_k` pins by the popularity in
    as many other requests. `hit_ratio_warm_pool` is the same of one pool with that many slots a
    layer. `distinct_experts` are those of a layer and step when so many requests decode in
    lockstep, out of twice `num_requests`.

    Raises:
      UsageError: The targets name a measure, strategy or statistic that is not known here, or a
        batch of more requests than are drawn.
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
        elif measure == "distinct_experts":
            achieved[measure] = {
                name: {size: _distinct_experts(workload, drawn, size) for size in sizes}
                for name, sizes in wanted.items()
            }
        elif measure in _HIT_RATIOS:
            achieved[measure] = _hit_ratios(workload, measure, experts)
        else:
            raise UsageError(
                f"workload {workload.name!r} has a target for {measure!r}",
                f"Known are {', '.join(_HIT_RATIOS)}, statistics and distinct_experts.",
            )
    return MappingProxyType(achieved)


_HIT_RATIOS = ("hit_ratio", "hit_ratio_warm", "hit_ratio_warm_pool")


def _hit_ratios(
    workload: Workload,
    measure: str,
    experts: Shaped[np.ndarray, "2 requests tokens layers topk"],
) -> dict[str, dict[int, float]]:
    profile, tested = experts
    num_experts, num_layers = workload.num_experts, 1
    if measure == "hit_ratio_warm_pool":
        num_experts, num_layers = num_experts * tested.shape[2], tested.shape[2]
        profile, tested = (as_one_layer(part, workload.num_experts) for part in experts)
    free = first_touch_ratio(tested, num_experts) * (measure != "hit_ratio")
    found = {}
    for strategy, points in workload.targets[measure].items():
        slots = tuple(count * num_layers for count in points)
        if strategy == "oracle":
            ratios = oracle_hit_ratio(tested, num_experts, slots)
        elif strategy == "lru":
            ratios = lru_hit_ratio(tested, num_experts)[list(slots)]
        elif strategy == "lfu":
            ratios = lfu_hit_ratio(tested, num_experts)[list(slots)]
        elif strategy == "top_k":
            ratios = pinned_hit_ratio(profile, tested, num_experts)[list(slots)]
        else:
            raise UsageError(
                f"workload {workload.name!r} has a target for {strategy!r}",
                "Targets are known for lru, lfu, oracle and top_k.",
            )
        warm = ratios + free[list(slots)]
        found[strategy] = dict(zip(points, warm.tolist(), strict=True))
    return found


def _distinct_experts(workload: Workload, drawn: Trace, batch_size: int) -> float:
    if batch_size > drawn.num_requests:
        raise UsageError(
            f"{drawn.num_requests} requests do not fill a batch of {batch_size}",
            f"Draw more, for workload {workload.name!r} has a target for it.",
        )
    # Places that have run dry would count for less.
    num_steps = drawn.num_tokens // drawn.num_requests * (drawn.num_requests // batch_size)
    ranked = np.sort(batch_trace(drawn, batch_size, num_steps=num_steps), axis=-1)
    return float(1 + (ranked[..., 1:] != ranked[..., :-1]).sum(axis=-1).mean())
