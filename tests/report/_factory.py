"""A made-up bench run: numbers by formula, so that tests know what the report must say."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

STUDY = ("on_demand", "oracle", "multi_look", "top_k", "intelligent")
ALL = (*STUDY, "lru", "lfu", "fifo", "gate_look")

_EXPERT_BYTES = 17_301_504
_HIT_RATIO = {
    "on_demand": 0.0,
    "oracle": 0.86,
    "multi_look": 0.67,
    "top_k": 0.55,
    "intelligent": 0.71,
    "lru": 0.65,
    "lfu": 0.64,
    "fifo": 0.60,
    "gate_look": 0.69,
}


def results(
    *,
    strategies: Sequence[str] = ALL,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    num_runs: int = 10,
    dispatches: Sequence[str] = ("batched",),
    model: str = "qwen1.5-moe-a2.7b",
    workload: str | None = "qwen1.5-moe",
) -> dict[str, Any]:
    """The content of a `results.json`."""
    generator = np.random.default_rng(7)
    grid = [
        _record(strategy, batch_size, run, dispatch, generator)
        for dispatch in dispatches
        for strategy in strategies
        for batch_size in batch_sizes
        for run in range(num_runs)
    ]
    return {
        "schema": "moejax.bench/1",
        "environment": {
            "device": "a processor",
            "versions": {"python": "3.11.0", "jax": "0.10.2"},
            "commit": "0123abc",
            "argv": ["moejax", "bench", "--seed", "0"],
            "seed": 0,
            "date": "2025-01-01T00:00:00+00:00",
        },
        "model": {
            "name": model,
            "num_layers": 24,
            "num_moe_layers": 24,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "expert_bytes": _EXPERT_BYTES,
        },
        "hardware": {
            "name": "rtx-3090",
            "title": "NVIDIA GeForce RTX 3090",
            "constants": {
                "pinned_h2d_bytes_per_s": _constant(25.3e9, "B/s", "fitted", 0.1e9),
                "matmul_flops": _constant(75.5e12, "FLOP/s", "measured", None),
                "vram_bytes": _constant(24e9, "B", "datasheet", None),
            },
        },
        "trace": {
            "name": "made up",
            "workload": workload,
            "source": "a source",
            "licence": "Apache-2.0",
            "sha256": "ab" * 32,
            "num_tokens": 20480,
        },
        "settings": {"slots": 30, "runs": num_runs, "batch_sizes": list(batch_sizes)},
        "grid": grid,
        "hit_curve": {name: _curve(name) for name in strategies if name != "on_demand"},
        "measured": {
            "transfer": [
                {
                    "kind": "transfer",
                    "memory": "host",
                    "direction": "h2d",
                    "num_bytes": 1 << 20,
                    "samples_s": [1.0e-4, 1.1e-4, 1.4e-4],
                }
            ],
            "compute": [
                {
                    "kind": "compute",
                    "num_tokens": 4,
                    "num_experts": 1,
                    "num_bytes": _EXPERT_BYTES,
                    "num_flops": 69_206_016,
                    "samples_s": [2.0e-3, 2.2e-3],
                }
            ],
        },
    }


def plan() -> dict[str, Any]:
    """The content of a `plan.json`."""
    layers = range(24)
    return {
        "tiers": [
            _tier("L1", "device", [4 + layer % 3 for layer in layers]),
            _tier("L2", "pinned", [12 + layer % 5 for layer in layers]),
            _tier("L3", "pageable", [30 - layer % 4 for layer in layers]),
        ]
    }


def write_run(folder: Path, content: dict[str, Any]) -> Path:
    """Puts `content` where a bench run would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def without_links(text: str) -> str:
    """Markdown with the words of its links alone."""
    return re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", text)


def _record(
    strategy: str, batch_size: int, run: int, dispatch: str, generator: np.random.Generator
) -> dict[str, Any]:
    distinct = 24 * 60 * (1 - (1 - 4 / 60) ** batch_size)
    num_sets = distinct if dispatch == "batched" else 24 * 4 * batch_size
    hit_ratio = _HIT_RATIO[strategy] * (1 - 0.04 * np.log2(batch_size))
    hit_ratio *= 1 + 0.01 * generator.standard_normal()
    misses = num_sets * (1 - hit_ratio)
    compute_s = 2.1e-3 + num_sets * 2e-5
    transfer_s = misses * 6.9e-4 * (1 + 0.02 * generator.standard_normal())
    stall_s = 0.9 * transfer_s
    mean = compute_s + stall_s
    num_steps = 256
    num_demands = round(num_sets * num_steps)
    slots = 0 if strategy == "on_demand" else 30
    return {
        "strategy": strategy,
        "batch_size": batch_size,
        "run": run,
        "dispatch": dispatch,
        "slots": slots,
        "capacity_bytes": slots * 24 * _EXPERT_BYTES,
        "num_late": 0,
        "num_demands": num_demands,
        "num_hits": int(num_demands * hit_ratio),
        "latency_s": {
            "mean": mean,
            "std": 0.1 * mean,
            "p50": 0.98 * mean,
            "p95": 1.17 * mean,
            "p99": 1.3 * mean,
        },
        "hit_ratio": hit_ratio,
        "late_ratio": 0.0,
        "fetched_bytes": misses * _EXPERT_BYTES,
        "wasted_bytes": 0.05 * misses * _EXPERT_BYTES,
        "stall_s": stall_s,
        "compute_s": compute_s,
        "transfer_s": transfer_s,
        "memory_bytes": max(slots * 24, min(60, 4 * batch_size)) * _EXPERT_BYTES,
        "num_steps": num_steps,
    }


def _curve(strategy: str) -> dict[str, list[float]]:
    slots = [2, 4, 8, 16, 30, 45, 60]
    bend = 1.0 / (0.3 + _HIT_RATIO[strategy])
    warm = [(slot / 60) ** bend for slot in slots]
    return {"slots": slots, "hit_ratio": [0.98 * one for one in warm], "hit_ratio_warm": warm}


def _constant(value: float, unit: str, kind: str, standard_error: float | None) -> dict[str, Any]:
    return {
        "value": value,
        "unit": unit,
        "kind": kind,
        "standard_error": standard_error,
        "source": "a table",
    }


def _tier(name: str, memory: str, experts_per_layer: list[int]) -> dict[str, Any]:
    return {
        "name": name,
        "memory": memory,
        "capacity_bytes": sum(experts_per_layer) * _EXPERT_BYTES,
        "experts_per_layer": experts_per_layer,
    }
