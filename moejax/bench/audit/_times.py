"""Claims about time: latency, its spread and tail, scaling, speedup and throughput."""

import numpy as np

from moejax.claims import STRATEGIES_OF_STUDY

from ._quantity import Assumption, Quantity
from ._values import (
    CACHING,
    latency_ms,
    latency_std_ms,
    requests_per_s,
    scaling,
    speedup,
    speedup_over_batches,
    tail_ratio,
    variation_percent,
)

SEQUENTIAL = Assumption("the requests of a batch decode one after another", "lockstep")
K_IN_EVERY_LAYER = Assumption(
    "every layer keeps 32 of its 64 experts, 25.5 GB in all, not the memory that is claimed",
    "claimed memory",
)

_UNIT_OF_WORK = ("no_unit_of_work",)
_LINEAR = ("exactly_linear_batch",)
_NO_UNIT = (
    "The claim names no unit of work. Ours is one decode step, {times} away from it; the all-miss "
    "step is set by the bytes it copies."
)
_NO_NOISE = (
    "Our runs differ in their requests only and no noise is added; the origin of the claimed "
    "spread is not given."
)
_TIES_TO_MISSES = (
    "With 32 slots a layer ours is {ours}, with the memory that is claimed {otherwise}: no one "
    "cache gives the claimed {claimed}."
)


def time_quantities() -> dict[str, Quantity]:
    """By path of the claim."""
    found: dict[str, Quantity] = {}
    for name in STRATEGIES_OF_STUDY:
        found |= _latencies(name) | _tails(name)
    for name in CACHING:
        found |= _speedups(name)
    for name in ("on_demand", "oracle", "top_k", "intelligent"):
        found[f"coefficient_of_variation_percent.{name}"] = Quantity(
            "%", variation_percent(name), _NO_NOISE
        )
    for name in ("oracle", "intelligent"):
        found |= _throughputs(name)
    return found


def _latencies(name: str) -> dict[str, Quantity]:
    at = f"latency_ms.{name}"
    crowded = (*_LINEAR, *_UNIT_OF_WORK)
    if name in ("oracle", "intelligent"):
        crowded += ("throughput_vs_latency",)
    quickest = "Ours with 32 slots in every layer; the memory that is claimed gives {otherwise}."
    if name == "on_demand":
        quickest = "The baseline over itself."
    return {
        f"{at}.batch1_mean": Quantity("ms", latency_ms(name, 1), _NO_UNIT, None, _UNIT_OF_WORK),
        f"{at}.batch1_std": Quantity("ms", latency_std_ms(name, 1), _NO_NOISE, None, _UNIT_OF_WORK),
        f"{at}.batch16_mean": Quantity(
            "ms", latency_ms(name, 16),
            "The claim is batch 1 times 16.00; in lockstep, sharing experts, ours is {otherwise}.",
            SEQUENTIAL, crowded,
        ),
        f"{at}.batch16_std": Quantity(
            "ms", latency_std_ms(name, 16),
            "The claim is batch 1 times 16.00, also in its spread, which would shrink relative to "
            "the mean if requests were independent.", SEQUENTIAL, crowded,
        ),
        f"{at}.speedup": Quantity(
            "x", speedup(name), quickest, K_IN_EVERY_LAYER, ("slots_vs_memory",)
        ),
        f"{at}.scaling_factor": Quantity(
            "x", scaling(name),
            "Exactly linear only if requests never share an expert: one after another {ours}, in "
            "lockstep {otherwise}.", SEQUENTIAL, _LINEAR,
        ),
    }  # fmt: skip


def _tails(name: str) -> dict[str, Quantity]:
    at = f"tail_latency_ms_batch1.{name}"
    p99 = (*_UNIT_OF_WORK, "p99_below_1000ms") if name == "on_demand" else _UNIT_OF_WORK
    tail = "Steps differ because their misses do; no noise is added."
    if name == "on_demand":
        tail = "Every step misses every expert, so steps differ by noise only, and none is added."
    return {
        f"{at}.p50": Quantity("ms", latency_ms(name, 1, "p50_s"), _NO_UNIT, None, _UNIT_OF_WORK),
        f"{at}.p95": Quantity("ms", latency_ms(name, 1, "p95_s"), _NO_UNIT, None, _UNIT_OF_WORK),
        f"{at}.p99": Quantity("ms", latency_ms(name, 1, "p99_s"), _NO_UNIT, None, p99),
        f"{at}.p99_over_p50": Quantity("x", tail_ratio(name), tail),
    }


def _speedups(name: str) -> dict[str, Quantity]:
    found = {}
    for column, choose in (("avg", np.mean), ("min", np.min), ("max", np.max)):
        found[f"speedup.{name}.{column}"] = Quantity(
            "x",
            speedup_over_batches(name, choose),
            _TIES_TO_MISSES,
            K_IN_EVERY_LAYER,
            ("slots_vs_memory", "one_pool_for_all_layers"),
        )
    return found


def _throughputs(name: str) -> dict[str, Quantity]:
    at = f"throughput_requests_per_s.{name}"
    return {
        f"{at}.batch1": Quantity(
            "/s", requests_per_s(name, 1),
            "One over the claimed latency. Ours is one over our step: a token of a request, since "
            "the claim names no unit of work.", None, _UNIT_OF_WORK,
        ),
        f"{at}.batch16": Quantity(
            "/s", requests_per_s(name, 16),
            "Ten times what the claimed latency at batch 16 gives; one after another, a batch of "
            "16 has the throughput of a batch of 1.", SEQUENTIAL, ("throughput_vs_latency",),
        ),
    }  # fmt: skip
