"""Claims in words: what strategies are, which are on a front, and which one to select."""

from collections.abc import Callable, Mapping
from typing import Any

from moejax.claims import STRATEGIES_OF_STUDY, is_beaten, table

from ._quantity import Quantity
from ._study import BASELINE
from ._values import BUILDABLE, FUTURE, hit_percent, latency_ms, memory_mb, speedup
from ._view import MissingError, Value, View

_SMALL_BUDGET_BYTES = 500e6
_OPINION = "A score of opinion; nothing that moejax computes bears on it."
_THEIR_SCORES = "Ours is by its scores of complexity and our speedups."
_EQUAL_SLOTS = "Ours have equal slots, so the fastest that caches is alone beside on_demand."


def choice_quantities(claims: Mapping[str, Any]) -> dict[str, Quantity]:
    """By path of the claim."""
    complexity = {one["id"]: one["complexity"] for one in claims["strategies"].values()}
    letters = {one["id"]: letter for letter, one in claims["strategies"].items()}
    opinions = {
        f"strategies.{letter}.complexity": Quantity("", None, _OPINION)
        for letter in claims["strategies"]
    }
    meanings = {f"strategies.{letters[name]}.meaning": one for name, one in _meanings().items()}
    hardware = Quantity(
        "ms a step",
        latency_ms("on_demand", 1),
        "No constant is stated. A token that misses everything takes {ours} on the profile of "
        "this card, and 1045.2 ms are claimed.",
        None,
        ("no_unit_of_work",),
        expected=claims["latency_ms"]["on_demand"][0],
    )
    fronts = _fronts(claims, complexity)
    return opinions | meanings | fronts | _rules(complexity) | {"hardware": hardware}


def _meanings() -> dict[str, Quantity]:
    return {
        "on_demand": Quantity(
            "prefetches a step", _prefetches("on_demand"), "It never prefetches.", expected=0.0
        ),
        "oracle": Quantity(
            "x the fastest other", _lead_of_oracle,
            "An upper bound where nothing is faster; it knows the future and cannot be built.",
            relation="over", expected=1.0,
        ),
        "multi_look": Quantity(
            "prefetches a step", _prefetches("multi_look"),
            "It looks ahead and prefetches only what is expected to pay; on a link that demand "
            "keeps busy that is {ours}.", relation="over", expected=0.0,
        ),
        "top_k": Quantity(
            "experts a layer", _slots_of("top_k"),
            "Ours pins 32 in every layer; the study's table lists 64 experts in all.",
            None, ("top_k_32_or_64", "one_pool_for_all_layers"), expected=32.0, has_real=False,
        ),
        "intelligent": Quantity(
            "% less time than lru", _saving_over_plain,
            "Learning pays where it beats plain LRU at equal slots; ours takes {ours}.",
            relation="over", expected=0.0,
        ),
    }  # fmt: skip


def _prefetches(strategy: str) -> Value:
    return lambda view: view.mean(strategy, "num_prefetches")


def _slots_of(strategy: str) -> Value:
    def value(view: View) -> float:
        view.runs(strategy, "latency_s")
        return view.slots

    return value


def _lead_of_oracle(view: View):
    fastest = min(view.mean(name, "latency_s").mean() for name in BUILDABLE)
    return fastest / view.mean(FUTURE, "latency_s")


def _saving_over_plain(view: View):
    saved = 1 - view.mean("intelligent", "latency_s") / view.mean(BASELINE, "latency_s")
    return 100 * saved


def _fronts(claims: Mapping[str, Any], complexity: Mapping[str, float]) -> dict[str, Quantity]:
    memory_mb = table(claims, "memory", "memory_mb")
    claimed_gain = table(claims, "latency_ms", "speedup")
    claimed_hits = table(claims, "hit_rate_percent", "mean")
    axes: dict[str, tuple[Callable, Callable[[str], Value], Mapping, Mapping]] = {
        "memory_vs_speedup": (_memory, speedup, memory_mb, claimed_gain),
        "complexity_vs_speedup": (lambda view: complexity, speedup, complexity, claimed_gain),
        "memory_vs_hit_rate": (_memory, hit_percent, memory_mb, claimed_hits),
    }
    found = {}
    for front, (costs, gain, claimed_costs, claimed_gains) in axes.items():
        for index, name in enumerate(claims["pareto"][front]):
            other = is_beaten(name, claimed_costs, claimed_gains)
            reason = _EQUAL_SLOTS if costs is _memory else _THEIR_SCORES
            if other is not None:
                reason = f"In the study's own tables {other} is no worse in both. " + reason
            found[f"pareto.{front}.{index}"] = Quantity(
                "", _on_front(name, costs, gain), reason, None, ("pareto_dominated",)
            )
    return found


def _memory(view: View) -> Mapping[str, float]:
    # Two digits: staging a layer's demand is no trade-off.
    return {name: float(f"{float(memory_mb(name)(view)):.2g}") for name in STRATEGIES_OF_STUDY}


def _on_front(
    strategy: str,
    costs: Callable[[View], Mapping[str, float]],
    gain: Callable[[str], Value],
) -> Value:
    def value(view: View) -> str:
        gains = {name: float(gain(name)(view)) for name in STRATEGIES_OF_STUDY}
        beaten_by = is_beaten(strategy, costs(view), gains)
        return strategy if beaten_by is None else f"beaten by {beaten_by}"

    return value


def _rules(complexity: Mapping[str, float]) -> dict[str, Quantity]:
    at = "selection_rules"
    return {
        f"{at}.memory budget < 500 MB": Quantity(
            "", _within_small_budget,
            "500 MB hold 17 experts for 28 layers: less than one slot a layer, so nothing can be "
            "kept.", None, ("one_pool_for_all_layers",),
        ),
        f"{at}.development time < 3 months": Quantity(
            "", None, "A simulator knows nothing of development time."
        ),
        f"{at}.maximum performance.0": Quantity(
            "", _first(latency_ms, STRATEGIES_OF_STUDY),
            "Lowest mean latency at batch 1. It knows the future, so it cannot be selected.",
        ),
        f"{at}.maximum performance.1": Quantity(
            "", _first(latency_ms, BUILDABLE),
            "Lowest mean latency at batch 1 of what can be built.",
        ),
        f"{at}.production deployment": Quantity(
            "", _first(_p99_ms, BUILDABLE),
            "Lowest 99th percentile at batch 1 of what can be built.",
        ),
        f"{at}.quick implementation": Quantity(
            "", _simplest(complexity),
            "The lowest of the study's own complexity scores among what can be built and beats "
            "on_demand; plain LRU, which is not among its strategies, has no score.",
        ),
        f"{at}.memory efficiency priority": Quantity(
            "", _first(_latency_times_memory, tuple(n for n in BUILDABLE if n != "on_demand")),
            "Most speedup a byte of what can be built and keeps anything.",
        ),
    }  # fmt: skip


def _first(cost: Callable[[str, int], Value], names: tuple[str, ...]) -> Value:
    return lambda view: min(names, key=lambda name: float(cost(name, 1)(view)))


def _p99_ms(strategy: str, batch_size: int) -> Value:
    return latency_ms(strategy, batch_size, "p99_s")


def _latency_times_memory(strategy: str, batch_size: int) -> Value:
    return lambda view: latency_ms(strategy, batch_size)(view) * memory_mb(strategy)(view)


def _simplest(complexity: Mapping[str, float]) -> Value:
    def value(view: View) -> str:
        pays = [name for name in BUILDABLE if float(speedup(name)(view)) > 1]
        return min(pays, key=lambda name: complexity[name], default="none")

    return value


def _within_small_budget(view: View) -> str:
    if view.fact("expert_bytes") * view.fact("num_moe_layers") <= _SMALL_BUDGET_BYTES:
        raise MissingError("a slot a layer and more was not simulated at this budget")
    return "on_demand"
