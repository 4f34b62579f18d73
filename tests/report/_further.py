"""Made-up experiments of `--full`: numbers by formula, so that tests know what must be said."""

from typing import Any

import numpy as np

from ._factory import results

STRATEGIES = ("on_demand", "oracle", "top_k", "intelligent", "lru")
SIZES = (1, 16)
GB = 10**9
_HITS = {"on_demand": 0.0, "oracle": 0.9, "top_k": 0.6, "intelligent": 0.7, "lru": 0.65}
_EXPERT_BYTES = 17_301_504
_LAYER_BYTES = 24 * _EXPERT_BYTES


def full_results(num_runs: int = 4) -> dict[str, Any]:
    """A bench run with everything that `--full` adds, but for the audit."""
    content = results(strategies=STRATEGIES, batch_sizes=SIZES, num_runs=num_runs)
    content["hardware"]["constants"]["price_usd"] = {
        "value": 1200.0, "unit": "USD", "kind": "datasheet", "standard_error": None,
        "source": "a list of 2022",
    }  # fmt: skip
    content["hardware"]["constants"]["host_read_bytes_per_s"] = {
        "value": 90e9, "unit": "B/s", "kind": "derived", "standard_error": None, "source": "a page",
    }  # fmt: skip
    latency_s = {
        (row["strategy"], row["batch_size"], row["run"]): row["latency_s"]["mean"]
        for row in content["grid"]
    }

    def beside(part: str, size: int, factor: float) -> list[float]:
        return [factor * latency_s[part, size, run] for run in range(num_runs)]

    return content | {
        "capacities": {
            "settings": {"num_runs": 2},
            "cells": [
                cell(name, size, slots)
                for name in STRATEGIES
                for slots in (1, 45)
                for size in SIZES
            ],
        },
        "gpus": _gpus(),
        "models": _models(),
        "hybrids": {
            "settings": {"num_runs": num_runs, "pinned_share_ratio": 0.25},
            "parts": {"pinned(lru)": ["lru", "top_k"], "host_compute(lru)": ["lru"]},
            "cells": [
                cell(name, size, 30, latency_s=beside("lru", size, factor), host=host)
                for name, host, factor in (
                    ("pinned(lru)", "stated", 0.9),
                    ("pinned(lru)", "cautious", 0.9),
                    ("host_compute(lru)", "stated", 0.5),
                    ("host_compute(lru)", "cautious", 1.2),
                )
                for size in SIZES
            ],
        },
        "top_k": {
            "settings": {"num_runs": 2},
            "cells": [
                cell(name, size, slots, reading=reading, num_experts_per_tok=topk)
                for reading, topk, slots in (
                    ("pins", 8, 4), ("pins", 8, 8), ("pins", 8, 16),
                    ("routed", 4, 32), ("routed", 8, 32), ("routed", 16, 32),
                )
                for name in STRATEGIES
                for size in SIZES
            ],
        },
    }  # fmt: skip


def cell(
    strategy: str, batch_size: int, slots: int, latency_s: list[float] | None = None, **head: Any
) -> dict[str, Any]:
    """A strategy that hits by its name and slots; a step is 10 ms and 100 ms a miss, a request."""
    hits = _HITS.get(strategy, 0.5) * min(1.0, slots / 40) ** 0.5
    wobble = 1 + 0.001 * np.arange(1, 3) * len(strategy)
    if latency_s is None:
        latency_s = (batch_size**0.7 * (0.01 + 0.1 * (1 - hits)) * wobble).tolist()
    num_runs = len(latency_s)
    kept = 0 if strategy == "on_demand" else slots * _LAYER_BYTES
    columns = {
        "latency_s": latency_s,
        "p50_s": latency_s,
        "p95_s": latency_s,
        "p99_s": [1.5 * one for one in latency_s],
        "hit_ratio": [hits] * num_runs,
        "fetched_bytes": [1e9 * (1 - hits)] * num_runs,
        "memory_bytes": [kept + 4 * batch_size * _EXPERT_BYTES] * num_runs,
        "num_prefetches": [0.0] * num_runs,
    }
    return {"strategy": strategy, "batch_size": batch_size, "slots": slots, **head, **columns}


def _gpus() -> dict[str, Any]:
    cards = [
        ("small", 5 * GB, None, None),
        ("rtx-3090", 24 * GB, 1200.0, "a list of 2022"),
        ("large", 80 * GB, None, None),
    ]
    fitting = {"small": 2, "rtx-3090": 45, "large": 60}
    rooms = [
        {
            "hardware": name,
            "model": "qwen1.5-moe-a2.7b",
            "batch_size": size,
            "context_tokens": 512,
            "dense_bytes": 3 * GB,
            "kv_bytes": size * GB // 10,
            "workspace_bytes": size * 1000,
            "staging_bytes": 4 * size * _EXPERT_BYTES,
            "num_experts": 60,
            "slots_that_fit": None if (name, size) == ("small", 16) else fitting[name],
        }
        for name, *_ in cards
        for size in SIZES
    ]
    return {
        "settings": {"num_runs": 2, "context_tokens": 512},
        "cards": [
            {
                "name": name,
                "title": f"a {name} card",
                "vram_bytes": float(vram),
                "price_usd": price,
                "price_source": source,
            }
            for name, vram, price, source in cards
        ],
        "rooms": rooms,
        "rooms_of_models": rooms,
        "cells": [
            cell(name, room["batch_size"], slots, hardware=room["hardware"], cache=cache)
            for name in STRATEGIES
            for room in rooms
            for cache, slots in (
                ("as in the run", 30),
                ("all that fit", room["slots_that_fit"]),
            )
            if slots is not None
        ],
    }


def _models() -> dict[str, Any]:
    models = {"qwen1.5-moe-a2.7b": (24, 60, 4), "switch-base-128": (12, 128, 1)}
    return {
        "settings": {"num_runs": 2},
        "models": [
            {
                "model": name,
                "workload": name,
                "num_moe_layers": layers,
                "num_experts": experts,
                "num_experts_per_tok": topk,
                "expert_bytes": 10**7,
                "routed_bytes": 10**10,
            }
            for name, (layers, experts, topk) in models.items()
        ],
        "cells": [
            cell(name, size, round(share * experts), model=model, share_ratio=share)
            for model, (_, experts, _) in models.items()
            for name in STRATEGIES
            for share in (0.25, 0.5)
            for size in SIZES
        ],
    }
