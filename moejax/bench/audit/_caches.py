"""Claims about caches: hits, memory, slots and tiers, cards and money."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.claims import STRATEGIES_OF_STUDY

from ._quantity import Assumption, Quantity
from ._times import K_IN_EVERY_LAYER
from ._values import (
    CACHING,
    experts_held,
    fact,
    hit_percent,
    hit_std_percent,
    memory_mb,
    price_usd,
    ratio,
    speedup,
)
from ._view import View

INT8_OF_ANOTHER = Assumption(
    "the experts are Qwen2-57B-A14B's in int8, not those of the model that is named in bf16",
    "named model",
)

_POOL = ("one_pool_for_all_layers", "slots_vs_memory")
_FITTED = (
    "The workload was fitted to the claimed hit rates, so agreement with 32 slots a layer says "
    "little; the memory that is claimed gives {otherwise}."
)
_PER_LAYER = (
    "The hit rate beside it takes 32 experts in each of 28 layers; the claimed memory is 2 a layer."
)
_SPREAD = "Over draws of requests; one draw of few requests spreads more than a long one."
_ROI = (
    "Read as speedup per 1000 USD, the only reading that gives the claimed figure; ours pays for "
    "32 slots in every layer."
)


def cache_quantities(claims: Mapping[str, Any]) -> dict[str, Quantity]:
    """By path of the claim."""
    found: dict[str, Quantity] = {}
    for name in STRATEGIES_OF_STUDY:
        found |= _hits(name) | _memory(name)
    return found | _slots(claims) | _cards(claims) | _money()


def _hits(name: str) -> dict[str, Quantity]:
    at = f"hit_rate_percent.{name}"
    if name == "on_demand":
        reason = "It keeps nothing, so nothing hits."
        return {
            f"{at}.mean": Quantity("%", hit_percent(name), reason),
            f"{at}.std": Quantity("%", hit_std_percent(name), reason),
            f"{at}.miss_rate": Quantity("%", _miss_percent(name), reason),
        }
    also = ("abstract_hit_rate",) if name == "intelligent" else ()
    return {
        f"{at}.mean": Quantity("%", hit_percent(name), _FITTED, K_IN_EVERY_LAYER, (*_POOL, *also)),
        f"{at}.std": Quantity("%", hit_std_percent(name), _SPREAD, None, also),
        f"{at}.miss_rate": Quantity(
            "%", _miss_percent(name), _FITTED, K_IN_EVERY_LAYER, (*_POOL, *also)
        ),
        f"{at}.efficiency_score": Quantity(
            "%", ratio(hit_percent(name), hit_percent("oracle"), 100.0),
            "Hit rate over the oracle's; with the memory that is claimed {otherwise}.",
            K_IN_EVERY_LAYER, (*_POOL, *also),
        ),
    }  # fmt: skip


def _miss_percent(name: str):
    return lambda view: 100 - hit_percent(name)(view)


def _memory(name: str) -> dict[str, Quantity]:
    at = f"memory.{name}"
    also = ("top_k_32_or_64",) if name == "top_k" else ()
    reason = (
        "Nothing is kept: one layer's demand passes through."
        if name == "on_demand"
        else (_PER_LAYER)
    )
    found = {
        f"{at}.memory_mb": Quantity("MB", memory_mb(name), reason, None, (*_POOL, *also)),
        f"{at}.experts_cached": Quantity("", experts_held(name), reason, None, (*_POOL, *also)),
        f"{at}.mb_per_expert": Quantity(
            "MB", fact("expert_mb"),
            "Qwen1.5-MoE-A2.7B, which the study names, has experts of {otherwise}; the stated "
            "geometry is Qwen2-57B-A14B's, whose experts take {ours} in int8.",
            INT8_OF_ANOTHER, ("wrong_architecture",), has_real=False,
        ),
    }  # fmt: skip
    if name != "on_demand":
        found[f"{at}.efficiency_score"] = Quantity(
            "%",
            ratio(memory_mb("oracle"), memory_mb(name), 100.0),
            "The oracle's memory over the strategy's. Ours have equal slots, so no strategy "
            "saves memory over another.",
            None,
            also,
        )
    return found


def _slots(claims: Mapping[str, Any]) -> dict[str, Quantity]:
    slots = claims["cache_slots"]
    found = {}
    for tier in slots:
        found[f"cache_slots.{tier}"] = Quantity(
            "slots",
            fact("slots_within_claimed_memory"),
            "The three tiers together are 256 slots, 7.3 GB; under 2 GB there is room for {ours}.",
            None,
            _POOL,
            has_real=False,
        )
        found[f"tier_roles.{tier}"] = Quantity(
            "% of demands",
            fact(f"tier_share_percent.{tier}"),
            "What the tier serves when the three are one LRU pool for all layers: a step walks "
            "through 217 slots before it comes back to a layer, so smaller pools never hit.",
            None,
            _POOL,
            "over",
            0.0,
            has_real=False,
        )
    return found


def _cards(claims: Mapping[str, Any]) -> dict[str, Quantity]:
    found = {}
    for card in claims["hardware_deployment"]:
        if card == "columns":
            continue
        at = f"hardware_deployment.{card}"
        found[f"{at}.vram_gb"] = Quantity(
            "GB", fact(f"vram_gb.{card}"), "The profile's; 24 GiB are 25.8 GB.", has_real=False
        )
        found[f"{at}.available_for_caching_gb"] = Quantity(
            "GB",
            fact(f"available_gb.{card}"),
            "Less dense weights, one request's KV cache of 2048 tokens and workspace.",
        )
        found[f"{at}.overhead_capacity"] = Quantity(
            "x",
            _fits(card),
            "How often the cache fits: {ours} with 32 slots in every layer, {otherwise} with the "
            "memory that is claimed, 2 slots a layer.",
            K_IN_EVERY_LAYER,
            _POOL,
        )
    return found


def _fits(card: str):
    def value(view: View):
        held_gb = 1e-3 * memory_mb("oracle")(view)
        return view.fact(f"available_gb.{card}") / held_gb

    return value


def _money() -> dict[str, Quantity]:
    reason = (
        "At the launch price of an RTX 3090 by the byte. With 32 slots in every layer {ours}, with "
        "the memory that is claimed {otherwise}."
    )

    def range_end(choose) -> Quantity:
        return Quantity(
            "USD",
            lambda view: choose([price_usd(name)(view) for name in CACHING], axis=0),
            reason,
            K_IN_EVERY_LAYER,
            _POOL,
        )

    return {
        "roi.oracle_memory_cost_usd": Quantity(
            "USD", price_usd("oracle"), reason, K_IN_EVERY_LAYER, _POOL
        ),
        "roi.memory_cost_usd_range.0": range_end(np.min),
        "roi.memory_cost_usd_range.1": range_end(np.max),
        "roi.oracle_roi": Quantity(
            "x per 1000 USD",
            ratio(speedup("oracle"), price_usd("oracle"), 1000.0),
            _ROI,
            K_IN_EVERY_LAYER,
            _POOL,
        ),
    }
