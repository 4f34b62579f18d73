"""Where the study's own figures exclude each other, found by arithmetic on them alone."""

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ._claims import table

Claims = Mapping[str, Any]

_BATCH_SIZES = {"batch1": 1, "batch16": 16}
_ROUNDING_RATIO = 0.02
"""Claimed figures have two or three digits; ratios of them differ by so much at most."""


def contradictions(claims: Claims) -> dict[str, str]:
    """Claims that other claims of the study exclude, each with the id of its `known_conflicts`.

    Where two claims exclude each other, the one with less behind it is named: the text against
    its table, the figure that was derived against the one that it was derived from.
    """
    return {path: name for name, find in _CHECKS.items() for path in find(claims)}


def is_beaten(strategy: str, costs: Mapping[str, float], gains: Mapping[str, float]) -> str | None:
    """The strategy that is no worse than this one in both and better in one; None if none is."""
    for other in sorted(costs.keys() & gains.keys() - {strategy}):
        no_worse = costs[other] <= costs[strategy] and gains[other] >= gains[strategy]
        better = costs[other] < costs[strategy] or gains[other] > gains[strategy]
        if no_worse and better:
            return other
    return None


def _throughput(claims: Claims) -> Iterator[str]:
    for batch, batch_size in _BATCH_SIZES.items():
        latency_ms = table(claims, "latency_ms", f"{batch}_mean")
        for strategy, claimed in claims["throughput_requests_per_s"].items():
            derived = batch_size / (latency_ms[strategy] * 1e-3)
            if abs(claimed[batch] / derived - 1) > _ROUNDING_RATIO:
                yield f"throughput_requests_per_s.{strategy}.{batch}"


def _p99(claims: Claims) -> Iterator[str]:
    p99_ms = table(claims, "tail_latency_ms_batch1", "p99")
    if max(p99_ms.values()) > claims["text_claims"]["p99_ms_under"]:
        yield "text_claims.p99_ms_under"


def _slots(claims: Claims) -> Iterator[str]:
    slots = claims["cache_slots"]
    taken_gb = sum(slots.values()) * claims["model"]["expert_mb"] / 1e3
    if taken_gb > claims["text_claims"]["memory_overhead_gb_under"]:
        yield from (f"cache_slots.{tier}" for tier in slots)
        yield "text_claims.memory_overhead_gb_under"


def _top_k(claims: Claims) -> Iterator[str]:
    found = re.search(r"K=(\d+)", claims["strategies"]["D"]["meaning"])
    cached = table(claims, "memory", "experts_cached")["top_k"]
    if found and int(found[1]) != cached:
        yield from ("strategies.D.meaning", "memory.top_k.experts_cached")


def _fronts(claims: Claims) -> Iterator[str]:
    speedup = table(claims, "latency_ms", "speedup")
    memory_mb = table(claims, "memory", "memory_mb")
    complexity = {one["id"]: one["complexity"] for one in claims["strategies"].values()}
    hit_rate = table(claims, "hit_rate_percent", "mean")
    fronts = {
        "memory_vs_speedup": (memory_mb, speedup),
        "complexity_vs_speedup": (complexity, speedup),
        "memory_vs_hit_rate": (memory_mb, hit_rate),
    }
    for front, (costs, gains) in fronts.items():
        for index, strategy in enumerate(claims["pareto"][front]):
            if is_beaten(strategy, costs, gains):
                yield f"pareto.{front}.{index}"


def _hit_rate(claims: Claims) -> Iterator[str]:
    in_table = table(claims, "hit_rate_percent", "mean")["intelligent"]
    if in_table < claims["text_claims"]["hit_rate_percent_over"]:
        yield "text_claims.hit_rate_percent_over"


_CHECKS: Mapping[str, Callable[[Claims], Iterator[str]]] = MappingProxyType(
    {
        "throughput_vs_latency": _throughput,
        "p99_below_1000ms": _p99,
        "slots_vs_memory": _slots,
        "top_k_32_or_64": _top_k,
        "pareto_dominated": _fronts,
        "abstract_hit_rate": _hit_rate,
    }
)
