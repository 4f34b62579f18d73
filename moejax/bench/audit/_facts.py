"""What cards, profiles and a pool without a clock say, beside the simulated grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moejax.bench._requests import Requests, draw_run
from moejax.cards import Hardware, ModelSpec, load_hardware, load_model
from moejax.cost import cliff_slots, estimate
from moejax.simulate import pool, ranks, replay
from moejax.strategies import STRATEGIES, Profile
from moejax.workloads import WORKLOADS, make_trace

CARDS_OF_STUDY = {
    "RTX 3090": "rtx-3090",
    "RTX 4090": "rtx-4090",
    "A100-40GB": "a100-40gb",
    "A100-80GB": "a100-80gb",
}
NAMED_MODEL = "qwen1.5-moe-a2.7b"
"""What the study says that it evaluates."""

GEOMETRY_MODEL = "qwen2-57b-a14b"
"""What has the numbers of experts, layers and experts a token that it states."""

SWITCH_MODEL = "switch-base-128"

_CONTEXT_TOKENS = 2048
_POOL_STEPS = 192
_SWITCH_TOKENS = 1024
_BATCH_SIZES = (1, 16)


def machine_facts(model: ModelSpec, hardware: Hardware) -> dict[str, Any]:
    """What a cache of this model costs, and what is left for it on the study's cards."""
    taken = estimate(hardware, model, context_tokens=_CONTEXT_TOKENS)
    facts: dict[str, Any] = {
        "expert_bytes": model.expert_bytes,
        "num_moe_layers": model.num_moe_layers,
        "num_experts": model.num_experts,
        "context_tokens": _CONTEXT_TOKENS,
    }
    for card, profile in CARDS_OF_STUDY.items():
        vram_bytes = load_hardware(profile).value("vram_bytes")
        rest = taken.dense_bytes + taken.kv_bytes + taken.workspace_bytes
        facts[f"vram_gb.{card}"] = vram_bytes / 1e9
        facts[f"available_gb.{card}"] = max(vram_bytes - rest, 0) / 1e9
    priced = load_hardware(CARDS_OF_STUDY["RTX 3090"])
    facts["usd_per_byte"] = priced.value("price_usd") / priced.value("vram_bytes")
    return facts


def study_facts(
    claims: Mapping[str, Any],
    model: ModelSpec,
    hardware: Hardware,
    requests: Requests,
    profile: Profile,
    seed: int,
) -> dict[str, Any]:
    """Facts of the study's geometry: machine, tiers, experts and Switch."""
    budget_bytes = claims["text_claims"]["memory_overhead_gb_under"] * 1e9
    another = load_model(GEOMETRY_MODEL)
    return {
        **machine_facts(model, hardware),
        **_tiers(claims["cache_slots"], model, requests, profile, seed),
        "slots_within_claimed_memory": int(budget_bytes) // model.expert_bytes,
        # One byte a parameter.
        "expert_mb": another.expert_params / 1e6,
        **_switch(hardware, seed),
    }


def facts_without(assumption: str) -> dict[str, Any]:
    """The facts that change where one of the study's assumptions is lifted."""
    if assumption == "named model":
        return {"expert_mb": load_model(NAMED_MODEL).expert_bytes / 1e6}
    if assumption == "bfloat16":
        return {"switch.expert_mb": load_model(SWITCH_MODEL).expert_bytes / 1e6}
    return {}


def _tiers(
    tier_slots: Mapping[str, int],
    model: ModelSpec,
    requests: Requests,
    profile: Profile,
    seed: int,
) -> dict[str, Any]:
    """Shares of demands that each tier serves: one LRU stack, cut where the tiers end."""
    trace = draw_run(requests, 0, num_places=1, num_steps=_POOL_STEPS)
    lane = replay(np.asarray(trace.experts[:_POOL_STEPS]), trace.num_experts)
    ends = np.cumsum(list(tier_slots.values())).astype(np.int64)
    counts = pool(
        STRATEGIES["lru"].make(profile), lane, ends, jax.random.key(seed), topk=trace.topk
    )
    share_percent = 100 * np.diff(counts.hit_ratio, prepend=0.0)
    facts = {
        f"tier_share_percent.{tier}": float(share)
        for tier, share in zip(tier_slots, share_percent, strict=True)
    }
    return facts | {"cliff_slots": cliff_slots(model)}


def _switch(hardware: Hardware, seed: int) -> dict[str, Any]:
    card = load_model(SWITCH_MODEL)
    model = dataclasses.replace(card, dtype="float32", expert_bytes=4 * card.expert_params)
    bounds = [estimate(hardware, model, batch_size=size) for size in _BATCH_SIZES]
    most = [one.all_miss_step_s / one.all_hit_step_s for one in bounds]
    return {
        "switch.num_experts": card.num_experts,
        "switch.num_layers": card.num_moe_layers,
        "switch.num_experts_per_tok": card.num_experts_per_tok,
        "switch.expert_mb": model.expert_bytes / 1e6,
        "switch.most_speedup": max(most),
        "switch.least_speedup": min(most),
        "switch.hit_percent": 100 * _switch_hit_ratio(card, seed),
    }


def _switch_hit_ratio(card: ModelSpec, seed: int) -> float:
    workload = dataclasses.replace(
        WORKLOADS["uniform"],
        model=card.name,
        num_layers=card.num_moe_layers,
        num_experts=card.num_experts,
        num_experts_per_tok=card.num_experts_per_tok,
    )
    trace = make_trace(workload, num_requests=1, tokens_per_request=_SWITCH_TOKENS, seed=seed)
    lane = replay(np.asarray(trace.experts), trace.num_experts)
    slots = np.array([card.num_experts // 2], np.int32)
    oracle = STRATEGIES["oracle"].make(None)
    counts = ranks(oracle, lane, slots, jax.random.key(seed), topk=trace.topk)
    return float(counts.hit_ratio[0])
