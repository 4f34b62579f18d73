"""A made-up study: cells by formula, so that tests know what an audit of it must say."""

from typing import Any

import numpy as np

from moejax.bench.audit import StudySlots, audit_rows, describe_study, real_view, study_views
from moejax.bench.audit._facts import machine_facts
from moejax.bench.audit._study import study_settings
from moejax.cards import load_hardware, load_model
from moejax.claims import load_claims

from ..report._factory import results

SLOTS = StudySlots(stated=32, in_bytes=2, in_tiers=9)
MODEL, HARDWARE = load_model("reference-study"), load_hardware("rtx-3090")
NUM_RUNS = 4
HIT_RATIO = {
    "on_demand": 0.0,
    "oracle": 0.9,
    "multi_look": 0.68,
    "top_k": 0.7,
    "intelligent": 0.78,
    "lru": 0.66,
}
FACTS = {
    **machine_facts(MODEL, HARDWARE),
    "tier_share_percent.l1": 0.0,
    "tier_share_percent.l2": 0.0,
    "tier_share_percent.l3": 20.0,
    "cliff_slots": 217,
    "slots_within_claimed_memory": 70,
    "expert_mb": 27.5,
    "switch.num_experts": 128,
    "switch.num_layers": 12,
    "switch.num_experts_per_tok": 1,
    "switch.expert_mb": 18.9,
    "switch.most_speedup": 11.0,
    "switch.least_speedup": 2.6,
    "switch.hit_percent": 74.0,
}


def make_cells(num_runs: int = NUM_RUNS) -> list[dict[str, Any]]:
    """Cells of every point of the study's grid."""
    points = [("sequential", size, 32) for size in (1, 2, 4, 8, 16)]
    points += [("batched", size, 32) for size in (1, 2, 4, 8, 16)]
    points += [("batched", 1, slots) for slots in (2, 4, 9, 16, 48)]
    return [
        _cell(name, dispatch, size, slots, num_runs)
        for name in HIT_RATIO
        for dispatch, size, slots in points
    ]


def audited_results() -> dict[str, Any]:
    """A bench run's results with the audit of the made-up study."""
    content = results(num_runs=2)
    for record in content["grid"]:
        record["num_prefetches"] = 0
    content["baseline"] = []
    return content | make_audit(content)


def make_audit(content: dict[str, Any], num_runs: int = NUM_RUNS) -> dict[str, Any]:
    """`study` and `audit` of the results of a run."""
    cells = make_cells(num_runs)
    settings = study_settings(SLOTS, MODEL, num_runs=num_runs, seed=0)
    study = {"settings": describe_study(settings, SLOTS), "facts": FACTS, "grid": cells}
    real = real_view(content, machine_facts(load_model("qwen1.5-moe-a2.7b"), HARDWARE))
    rows = audit_rows(load_claims(), study_views(cells, SLOTS, FACTS), real)
    return {"study": study, "audit": rows}


def _cell(name: str, dispatch: str, size: int, slots: int, num_runs: int) -> dict[str, Any]:
    wobble = 1 + 0.01 * np.sin(np.arange(num_runs) + len(name)) * (name != "on_demand")
    hits = np.minimum(HIT_RATIO[name] * (slots / 32) ** 0.7 * wobble, 0.99)
    # Sequential work is linear in the batch; requests in lockstep share experts.
    work = size if dispatch == "sequential" else size**0.7
    compute, stall = 0.02 * work, 0.25 * work * (1 - hits)
    latency = compute + stall
    held = slots * 28 * 28.5e6 if name != "on_demand" else 8 * 28.5e6
    alike = np.ones(num_runs)
    columns = {
        "latency_s": latency, "p50_s": 0.98 * latency, "p95_s": 1.1 * latency,
        "p99_s": 1.2 * latency, "hit_ratio": hits, "late_ratio": 0 * alike,
        "compute_s": compute * alike, "stall_s": stall * alike,
        "fetched_bytes": 6e9 * (1 - hits), "memory_bytes": held * alike,
        "capacity_bytes": held * alike, "num_prefetches": (name == "multi_look") * alike,
    }  # fmt: skip
    head = {"strategy": name, "batch_size": size, "dispatch": dispatch, "slots": slots}
    return head | {field: values.tolist() for field, values in columns.items()}
