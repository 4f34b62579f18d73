"""Quantities that several claims are about, each from one view."""

from collections.abc import Callable, Iterable

import numpy as np

from moejax.claims import STRATEGIES_OF_STUDY

from ._view import Value, View

FUTURE = "oracle"
BUILDABLE = tuple(name for name in STRATEGIES_OF_STUDY if name != FUTURE)
CACHING = tuple(name for name in STRATEGIES_OF_STUDY if name != "on_demand")


def latency_ms(strategy: str, batch_size: int, field: str = "latency_s") -> Value:
    """Mean over runs of a step's latency."""
    return lambda view: 1e3 * view.mean(strategy, field, batch_size)


def latency_std_ms(strategy: str, batch_size: int) -> Value:
    """Standard deviation over runs of the mean latency."""
    return lambda view: 1e3 * view.std(strategy, "latency_s", batch_size)


def variation_percent(strategy: str) -> Value:
    """Coefficient of variation over runs at batch 1."""
    return lambda view: 100 * view.std(strategy, "latency_s") / view.mean(strategy, "latency_s")


def scaling(strategy: str) -> Value:
    """Latency at batch 16 over that at batch 1."""
    return lambda view: view.mean(strategy, "latency_s", 16) / view.mean(strategy, "latency_s", 1)


def speedup(strategy: str, batch_size: int = 1) -> Value:
    """Mean latency of on_demand over that of the strategy."""
    return lambda view: (
        view.mean("on_demand", "latency_s", batch_size)
        / view.mean(strategy, "latency_s", batch_size)
    )


def tail_ratio(strategy: str) -> Value:
    """99th percentile over the median, over the steps of a run at batch 1."""
    return lambda view: view.mean(strategy, "p99_s") / view.mean(strategy, "p50_s")


def requests_per_s(strategy: str, batch_size: int) -> Value:
    """Requests of a batch over the latency of a step."""
    return lambda view: batch_size / view.mean(strategy, "latency_s", batch_size)


def hit_percent(strategy: str) -> Value:
    """Hit ratio, mean over batch sizes."""
    return lambda view: 100 * over_batches(view, strategy, "hit_ratio").mean(-1)


def hit_std_percent(strategy: str) -> Value:
    """Standard deviation over runs of the hit ratio, mean over batch sizes."""

    def value(view: View):
        # A single run raises here.
        view.std(strategy, "hit_ratio", view.batch_sizes[0])
        return 100 * over_batches(view, strategy, "hit_ratio").std(-1, ddof=1)

    return value


def over_batches(view: View, strategy: str, field: str):
    """A field's mean over batch sizes, a value a run."""
    return np.mean([view.runs(strategy, field, size) for size in view.batch_sizes], axis=0)


def memory_mb(strategy: str) -> Value:
    """Most device memory of the strategy's experts at batch 1."""
    return lambda view: 1e-6 * view.mean(strategy, "memory_bytes")


def experts_held(strategy: str) -> Value:
    """The same in experts."""
    return lambda view: view.mean(strategy, "memory_bytes") / view.fact("expert_bytes")


def price_usd(strategy: str) -> Value:
    """The same at the price of the card's memory."""
    return lambda view: view.mean(strategy, "memory_bytes") * view.fact("usd_per_byte")


def ratio(above: Value, below: Value, scale: float = 1.0) -> Value:
    """One quantity over another."""
    return lambda view: scale * above(view) / below(view)


def extreme(choose: Callable, values: Iterable[Value]) -> Value:
    """The smallest (`np.min`) or largest (`np.max`) of several quantities."""
    values = tuple(values)
    return lambda view: choose([value(view) for value in values], axis=0)


def speedup_over_batches(strategy: str, choose: Callable) -> Value:
    """Mean, smallest or largest speedup over batch sizes."""
    return lambda view: choose([speedup(strategy, size)(view) for size in view.batch_sizes], axis=0)


def fact(name: str) -> Value:
    """What arithmetic on cards and profiles says."""
    return lambda view: view.fact(name)
