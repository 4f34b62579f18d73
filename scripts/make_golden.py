"""Counts the hits of another simulator's policies, for tests to compare with.

    python scripts/make_golden.py

needs libcachesim (the extra `peers`) and writes tests/golden/libcachesim.json. The routing is
made here from a fixed seed, with one expert an event, so that a set is a single request and both
simulators mean the same by an access.
"""

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "libcachesim.json"
SEED = 20_240_501
NUM_STEPS, NUM_LAYERS, NUM_EXPERTS = 600, 4, 24
# The peer's S3-FIFO admits nothing while a tenth of the cache is less than two objects.
LEAST_SLOTS = {"s3fifo": 20}


def make_experts() -> UInt8[np.ndarray, "steps layers 1"]:
    """One expert an event: skewed, with hot experts that move on every hundred steps."""
    uniform = np.random.default_rng(SEED).random((NUM_STEPS, NUM_LAYERS))
    skew = 1.0 + np.arange(NUM_LAYERS)
    rank = np.floor(NUM_EXPERTS * uniform ** skew[None, :]).astype(np.int64)
    shift = 5 * (np.arange(NUM_STEPS) // 100)[:, None]
    return ((rank + shift) % NUM_EXPERTS).astype(np.uint8)[:, :, None]


def count_hits(experts: UInt8[np.ndarray, "steps layers 1"]) -> dict[str, list[list[int]]]:
    """Hits by policy, layer and capacity from 1, or `LEAST_SLOTS`, to all experts."""
    peer = importlib.import_module("libcachesim")
    policies = {
        "lru": peer.LRU,
        "belady": peer.Belady,
        "sieve": peer.Sieve,
        "s3fifo": peer.S3FIFO,
        "arc": peer.ARC,
    }
    return {
        name: [
            [
                _replay(peer, policy(cache_size=slots, hashpower=10), column)
                for slots in range(LEAST_SLOTS.get(name, 1), NUM_EXPERTS + 1)
            ]
            for column in experts[:, :, 0].T
        ]
        for name, policy in policies.items()
    }


def describe(experts: UInt8[np.ndarray, "steps layers 1"]) -> dict[str, Any]:
    """The trace as the golden file names it."""
    return {
        "seed": SEED,
        "shape": [NUM_STEPS, NUM_LAYERS, NUM_EXPERTS],
        "sha256": hashlib.sha256(experts.tobytes()).hexdigest(),
    }


def main() -> None:
    """Writes the golden counts."""
    experts = make_experts()
    version = importlib.import_module("importlib.metadata").version("libcachesim")
    golden = {"peer": f"libcachesim {version}", "trace": describe(experts), **count_hits(experts)}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(_one_row_a_line(golden), encoding="utf-8")


def _replay(peer, cache, column) -> int:
    following = _next_access(column)
    num_hits = 0
    for time, expert in enumerate(column.tolist()):
        # Object 0 means none to the peer.
        request = peer.Request(
            obj_id=expert + 1, clock_time=time, next_access_vtime=following[time]
        )
        num_hits += bool(cache.get(request))
    return num_hits


def _next_access(column) -> list[int]:
    never = 2**62
    seen: dict[int, int] = {}
    following = [never] * len(column)
    for time in range(len(column) - 1, -1, -1):
        following[time] = seen.get(column[time], never)
        seen[column[time]] = time
    return following


def _one_row_a_line(golden: dict[str, Any]) -> str:
    text = json.dumps(golden, indent=1)
    return re.sub(r"\[[\d,\s]+\]", lambda row: json.dumps(json.loads(row[0])), text) + "\n"


if __name__ == "__main__":
    main()
