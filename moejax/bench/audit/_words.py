"""Claims of the study's text, and those about Switch Transformers."""

import numpy as np

from ._quantity import Assumption, Quantity
from ._times import K_IN_EVERY_LAYER
from ._values import (
    CACHING,
    extreme,
    fact,
    hit_percent,
    latency_ms,
    memory_mb,
    ratio,
    speedup,
    speedup_over_batches,
    tail_ratio,
    variation_percent,
)

FLOAT32 = Assumption("its experts are stored in float32, not in bfloat16", "bfloat16")

_NO_NOISE = "Runs differ in their requests only; steps and runs spread as their misses do."
_BOUND = (
    "Not even with every expert resident: a step in which all miss takes {ours} as long as one in "
    "which all hit."
)


def word_quantities() -> dict[str, Quantity]:
    """By path of the claim."""
    return _text() | _switch()


def _text() -> dict[str, Quantity]:
    at = "text_claims"
    speedups = [speedup_over_batches(name, np.mean) for name in CACHING]
    tails = [tail_ratio(name) for name in ("on_demand", *CACHING)]
    spreads = [variation_percent(name) for name in ("on_demand", *CACHING)]
    p99s = [latency_ms(name, 1, "p99_s") for name in ("on_demand", *CACHING)]
    memory = [ratio(memory_mb(name), memory_mb("on_demand")) for name in CACHING]
    pool = ("slots_vs_memory", "one_pool_for_all_layers")
    both = "With 32 slots a layer {ours}, with the memory that is claimed {otherwise}."
    invested = "The oracle's and top_k's memory over one layer's demand. " + both

    def claim(unit, value, reason, conflicts=(), assumption=None, relation="equal") -> Quantity:
        return Quantity(unit, value, reason, assumption, conflicts, relation)

    return {
        f"{at}.max_latency_improvement": claim(
            "x", extreme(np.max, speedups), both, pool, K_IN_EVERY_LAYER
        ),
        f"{at}.hit_rate_percent_over": claim(
            "%", hit_percent("intelligent"),
            "Said of intelligent prefetching, for which the study's own table has 78.5 %.",
            ("abstract_hit_rate",), K_IN_EVERY_LAYER, "over",
        ),
        f"{at}.memory_overhead_gb_under": claim(
            "GB", lambda view: 1e-3 * extreme(np.max, map(memory_mb, CACHING))(view),
            "The three tiers alone are 256 slots of 28.5 MB, 7.3 GB; 32 slots in every layer, as "
            "the hit rates take, are {ours}.", pool, None, "under",
        ),
        f"{at}.intelligent_share_of_oracle_percent": claim(
            "%", ratio(speedup("intelligent"), speedup("oracle"), 100.0),
            "Speedup over the oracle's. " + both, pool, K_IN_EVERY_LAYER,
        ),
        f"{at}.memory_investment_ratio_range.0": claim(
            "x", extreme(np.min, memory), invested, pool, K_IN_EVERY_LAYER
        ),
        f"{at}.memory_investment_ratio_range.1": claim(
            "x", extreme(np.max, memory), invested, pool, K_IN_EVERY_LAYER
        ),
        f"{at}.speedup_range.0": claim(
            "x", extreme(np.min, speedups), both, pool, K_IN_EVERY_LAYER
        ),
        f"{at}.speedup_range.1": claim(
            "x", extreme(np.max, speedups), both, pool, K_IN_EVERY_LAYER
        ),
        f"{at}.p99_over_p50_range.0": claim("x", extreme(np.min, tails), _NO_NOISE),
        f"{at}.p99_over_p50_range.1": claim("x", extreme(np.max, tails), _NO_NOISE),
        f"{at}.p99_ms_under": claim(
            "ms", extreme(np.max, p99s),
            "The study's own table has 1194.8 ms for on_demand; ours is one decode step.",
            ("p99_below_1000ms", "no_unit_of_work"), None, "under",
        ),
        f"{at}.cv_percent_range.0": claim("%", extreme(np.min, spreads), _NO_NOISE),
        f"{at}.cv_percent_range.1": claim("%", extreme(np.max, spreads), _NO_NOISE),
    }  # fmt: skip


def _switch() -> dict[str, Quantity]:
    at = "switch_transformer"
    card = "The card of Switch-Base-128."

    def of_card(unit: str, name: str, reason: str, **more) -> Quantity:
        return Quantity(unit, fact(f"switch.{name}"), reason, has_real=False, **more)

    return {
        f"{at}.num_experts": of_card("", "num_experts", card),
        f"{at}.num_layers": of_card("", "num_layers", card + " Of its 24 layers 12 have experts."),
        f"{at}.num_experts_per_tok": of_card("", "num_experts_per_tok", card),
        f"{at}.expert_mb_range.0": of_card(
            "MB", "expert_mb", "Two matrices of 768 x 3072: {ours} in float32, {otherwise} in "
            "bfloat16.", assumption=FLOAT32,
        ),
        f"{at}.expert_mb_range.1": of_card(
            "MB", "expert_mb", "All its experts have one size, {ours} in float32.",
            assumption=FLOAT32,
        ),
        f"{at}.max_speedup": of_card(
            "x", "most_speedup",
            _BOUND + " That is at batch 16, where a step copies most.",
        ),
        f"{at}.min_speedup": of_card("x", "least_speedup", _BOUND + " That is at batch 1."),
        f"{at}.hit_rate_percent_over": of_card(
            "%", "hit_percent",
            "The oracle's, with half of the experts in every layer and routing without structure; "
            "the study gives neither its cache nor its routing.", relation="over",
        ),
    }  # fmt: skip
