"""Times the rank simulator beside libCacheSim and plain numpy, and compares what they count.

    python scripts/bench_simulator.py -o json

makes two traces from a fixed seed, sweeps five strategies over 8 and over 61 capacities of every
layer, and does the same with five policies of libcachesim (the extra `peers`) on one core and in
two processes. All times of a record are of one run on one machine; the ratios are of the fastest
samples. libcachesim replays request by request, `moejax` a token's set at a time, so cells are
compared where both mean the same: one request an event. Every strategy is compared with plain
numpy, set at a time, on the first steps.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from moejax.results import capture_environment, to_plain
from moejax.simulate import lru_hit_curve, ranks, stream
from moejax.strategies import (
    CacheShape,
    Decision,
    Profile,
    Strategy,
    always_admit,
    lfu,
    lru,
    oracle,
    top_k,
)

SEED = 20_240_502
POLICIES = ("LRU", "LFU", "FIFO", "Sieve", "Belady")
# Shares of a layer's experts: 4, 8, 12, ... of 64; and every capacity from 4 to 64 of 64.
EIGHT = np.array([4, 8, 12, 16, 24, 32, 40, 48]) / 64
ALL = np.arange(4, 65) / 64
TOPIC_STEPS = 256
NEVER = 2**62
# One request as libCacheSim's oracleGeneral reader takes it.
REQUEST = np.dtype([("time", "<u4"), ("obj", "<u8"), ("size", "<u4"), ("next", "<i8")])


class Geometry(NamedTuple):
    """Sizes of a trace."""

    num_layers: int
    num_experts: int
    num_steps: int
    topk: int


GEOMETRIES = (Geometry(24, 64, 20_000, 4), Geometry(48, 128, 5_000, 8))


def main(arguments: list[str] | None = None) -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", choices=["json", "table"], default="table")
    parser.add_argument("--repeats", type=int, default=3, help="warm samples of ours")
    parser.add_argument("--peer-repeats", type=int, default=1, help="samples of libcachesim")
    parser.add_argument("--twin-steps", type=int, default=2000, help="steps of plain numpy")
    parser.add_argument("--shrink", type=int, default=1, help="divides the number of steps")
    options = parser.parse_args(arguments)
    has_peer = importlib.util.find_spec("libcachesim") is not None
    if not has_peer:
        say("libcachesim is not installed: its times are null; install the extra `peers`")
    records = []
    for geometry in GEOMETRIES:
        geometry = geometry._replace(num_steps=geometry.num_steps // options.shrink)
        records.append(measure(geometry, options, has_peer))
    results = {
        "schema": "moejax.simulator-bench/1",
        "environment": to_plain(capture_environment(SEED)),
        "peer": f"libcachesim {importlib.metadata.version('libcachesim')}" if has_peer else None,
        "records": records,
    }
    if options.output == "json":
        print(json.dumps(results, indent=1))
        return
    for record in records:
        for name, value in record.items():
            print(f"{name}: {value}")


def measure(geometry: Geometry, options: argparse.Namespace, has_peer: bool) -> dict[str, Any]:
    """Times and cells of one trace."""
    experts, profile = make_experts(geometry, 0), make_profile(geometry)
    strategies = make_strategies(profile)
    record: dict[str, Any] = dict(geometry._asdict(), num_requests=experts.size)
    for label, shares in (("8", EIGHT), ("61", ALL)):
        slots = np.round(shares * geometry.num_experts).astype(int)
        say(f"{label} capacities of {geometry}")
        samples = [
            _timed(lambda slots=slots: sweep(strategies, experts, geometry, slots))
            for _ in range(1 + options.repeats)
        ]
        record[f"first_call_s_{label}"], *record[f"ours_s_{label}"] = samples
        record |= peer_times(experts, slots, label, min(samples[1:]), options, has_peer)
    # The first sample compiles.
    curves = [_timed(lambda: lru_hit_curve(experts, geometry.num_experts)) for _ in range(4)]
    record["lru_all_s"] = curves[1:]
    record["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return record | compare(strategies, profile, experts, geometry, options.twin_steps, has_peer)


def make_experts(geometry: Geometry, number: int) -> UInt8[np.ndarray, "steps layers topk"]:
    """Skewed routing whose hot experts move on with every topic; distinct experts an event."""
    layers, experts, steps, topk = geometry
    generator = np.random.default_rng([SEED, number])
    skew = -0.8 * np.log(np.arange(1, experts + 1))
    popularity = np.stack([generator.permutation(skew) for _ in range(layers)])
    blocks = []
    for start in range(0, steps, TOPIC_STEPS):
        rows = min(TOPIC_STEPS, steps - start)
        worth = popularity + 1.5 * generator.normal(size=(layers, experts))
        drawn = worth + generator.gumbel(size=(rows, layers, experts))
        blocks.append(np.argpartition(-drawn, topk, axis=-1)[..., :topk].astype(np.uint8))
    return np.concatenate(blocks)


def make_profile(geometry: Geometry) -> Profile:
    """Uses and successions of another trace, for the strategies that learn beforehand."""
    layers, num_experts, steps, topk = geometry
    earlier = make_experts(geometry._replace(num_steps=max(2, steps // 10)), 1)
    demand = _demand(earlier, num_experts).astype(np.float32).transpose(1, 0, 2)
    return Profile(
        num_tokens=len(earlier),
        topk=topk,
        num_uses=demand.sum(1),
        transition=np.zeros((layers, 0, num_experts, num_experts), np.float32),
        successor=demand[:, :-1].transpose(0, 2, 1) @ demand[:, 1:],
    )


def make_strategies(profile: Profile) -> dict[str, Strategy]:
    """Those that score for all capacities at once."""
    return {
        "lru": lru(),
        "lfu": lfu(),
        "oracle": oracle(),
        "top_k": top_k(profile),
        "transition": transition_scores(profile),
    }


def transition_scores(profile: Profile) -> Strategy:
    """Keeps what followed these experts in the same layer of the profile."""

    def init(shape: CacheShape):
        return jnp.asarray(profile.successor)

    def step(state, access, key):
        return state, Decision((access.demand > 0).astype(jnp.float32) @ state)

    return Strategy(init, step)


def sweep(
    strategies: dict[str, Strategy], experts, geometry: Geometry, slots
) -> dict[str, Int[np.ndarray, "layers capacities"]]:
    """Hits of each strategy, from ids to counts."""
    source = stream(experts, geometry.num_experts)
    key = jax.random.key(0)
    return {
        name: ranks(strategy, source, slots, key, topk=experts.shape[-1]).num_hits
        for name, strategy in strategies.items()
    }


# --- libCacheSim ------------------------------------------------------------------------------


def peer_times(experts, slots, label: str, ours_s: float, options, has_peer: bool) -> dict:
    """Times of five policies at these capacities, and how many times longer they took."""
    names = {"one_core": 1, "two_processes": 2}
    found: dict[str, Any] = {}
    if not has_peer:
        for name in names:
            found |= {f"libcachesim_{name}_s_{label}": None, f"ratio_{name}_{label}": None}
        return found
    with tempfile.TemporaryDirectory() as folder:
        paths = write_requests(Path(folder), experts)
        jobs = [
            (policy, path, int(size)) for policy in POLICIES for path in paths for size in slots
        ]
        for name, num_processes in names.items():
            context = get_context("spawn")
            with ProcessPoolExecutor(num_processes, context) as pool:
                # Processes start and import before the clock does.
                list(pool.map(peer_hits, jobs[: 2 * num_processes]))
                run = functools.partial(pool.map, peer_hits, jobs, chunksize=8)
                samples = [_timed(lambda run=run: list(run())) for _ in range(options.peer_repeats)]
            found[f"libcachesim_{name}_s_{label}"] = samples
            found[f"ratio_{name}_{label}"] = min(samples) / ours_s
    return found


def write_requests(folder: Path, experts) -> list[str]:
    """One file of requests a layer: the experts of a token one after another."""
    paths = []
    for layer in range(experts.shape[1]):
        column = experts[:, layer].ravel()
        requests = np.zeros(len(column), REQUEST)
        requests["time"] = np.arange(len(column))
        # Object 0 means none to the peer.
        requests["obj"] = column.astype(np.uint64) + 1
        requests["size"] = 1
        requests["next"] = _next_request(column)
        paths.append(str(folder / f"{layer}.oracleGeneral.bin"))
        requests.tofile(paths[-1])
    return paths


def peer_hits(job: tuple[str, str, int]) -> int:
    """Hits of one policy, layer and capacity."""
    policy, path, size = job
    peer = importlib.import_module("libcachesim")
    reader = peer.TraceReader(path, peer.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(peer, policy)(cache_size=size, hashpower=8)
    miss_ratio, _ = cache.process_trace(reader)
    num_requests = reader.get_num_of_req()
    return num_requests - round(miss_ratio * num_requests)


def _next_request(column) -> Int[np.ndarray, " requests"]:
    """Number of the next request for the same expert, -1 if none."""
    order = np.argsort(column, kind="stable")
    following = np.full(len(column), -1, np.int64)
    same = column[order][:-1] == column[order][1:]
    following[order[:-1][same]] = order[1:][same]
    return following


# --- cells ------------------------------------------------------------------------------------


def compare(strategies, profile, experts, geometry: Geometry, twin_steps: int, has_peer) -> dict:
    """How many cells, a strategy, layer and capacity each, were compared and how many agree."""
    slots = np.round(EIGHT * geometry.num_experts).astype(int)
    short = experts[:twin_steps]
    found = sweep(strategies, short, geometry, slots)
    start = time.perf_counter()
    expected = {
        name: numpy_hits(name, short, profile, geometry.num_experts, slots) for name in strategies
    }
    numpy_s = time.perf_counter() - start
    pairs = [(found[name], expected[name]) for name in strategies]
    if has_peer:
        single = experts[:, :, :1]
        admitting = {"LRU": always_admit(lru()), "Belady": always_admit(oracle())}
        with tempfile.TemporaryDirectory() as folder:
            paths = write_requests(Path(folder), single)
            for policy, hits in sweep(admitting, single, geometry, slots).items():
                theirs = [[peer_hits((policy, path, int(c))) for c in slots] for path in paths]
                pairs.append((hits, np.array(theirs)))
    return {
        "numpy_s": numpy_s,
        "numpy_steps": len(short),
        "cells": sum(ours.size for ours, _ in pairs),
        "cells_equal": int(sum((ours == theirs).sum() for ours, theirs in pairs)),
    }


def numpy_hits(
    name: str, experts, profile: Profile, num_experts: int, slots
) -> Int[np.ndarray, "layers capacities"]:
    """The same replay, set at a time, by sorting every step's scores."""
    num_layers = experts.shape[1]
    lanes = (num_layers, len(slots), num_experts)
    resident, num_hits = np.zeros(lanes, bool), np.zeros(lanes[:2], np.int64)
    admit = np.ones((num_layers, num_experts), bool)
    if name == "top_k":
        best = np.argsort(-profile.num_uses, axis=-1, kind="stable")
        admit[:] = False
        np.put_along_axis(admit, best[:, : num_experts // 2], True, axis=-1)
    for demand, score in _scores(name, _demand(experts, num_experts), profile):
        num_hits += (resident & demand[:, None]).sum(-1)
        order = np.broadcast_to(np.argsort(-score, axis=-1, kind="stable")[:, None], lanes)
        candidates = np.take_along_axis((resident | demand[:, None]) & admit[:, None], order, -1)
        kept = candidates & (candidates.cumsum(-1) <= slots[:, None])
        np.put_along_axis(resident, order, kept, axis=-1)
    return num_hits


def _scores(name: str, demand, profile: Profile) -> Iterator[tuple[Any, Any]]:
    """Demand and scores, step by step."""
    num_steps, *lanes = demand.shape
    last, uses = np.full(lanes, -1), np.zeros(lanes, int)
    coming = np.full((num_steps + 1, *lanes), NEVER)
    for step in reversed(range(num_steps)):
        coming[step] = np.where(demand[step], step, coming[step + 1])
    for step, now in enumerate(demand):
        last, uses = np.where(now, step, last), uses + now
        following = np.einsum("lj,lje->le", now, profile.successor) if name == "transition" else 0
        scores = {
            "lru": last,
            "lfu": uses,
            "oracle": -coming[step + 1],
            "top_k": profile.num_uses,
            "transition": following,
        }
        yield now, scores[name]


def _demand(experts, num_experts: int):
    demand = np.zeros((*experts.shape[:2], num_experts), bool)
    np.put_along_axis(demand, experts.astype(np.intp), True, axis=-1)
    return demand


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
