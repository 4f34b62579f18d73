"""What `bench_simulator.py` compares with: libCacheSim, and plain numpy set at a time."""

import functools
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from simulator_traces import demanded

from moejax.strategies import Profile

POLICIES = ("LRU", "LFU", "FIFO", "Sieve", "Belady")
NEVER = 2**62
# One request as libCacheSim's oracleGeneral reader takes it.
REQUEST = np.dtype([("time", "<u4"), ("obj", "<u8"), ("size", "<u4"), ("next", "<i8")])


def peer_times(
    experts: Shaped[np.ndarray, "steps layers topk"],
    slots: Int[np.ndarray, " capacities"],
    num_samples: int,
) -> dict[str, list[float]]:
    """Times of five policies at these capacities, on one core and in two processes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_requests(Path(folder), experts)
        jobs = [
            (policy, path, int(size)) for policy in POLICIES for path in paths for size in slots
        ]
        for name, num_processes in {"one_core": 1, "two_processes": 2}.items():
            context = get_context("spawn")
            with ProcessPoolExecutor(num_processes, context) as pool:
                # Processes start and import before the clock does.
                list(pool.map(peer_hits, jobs[: 2 * num_processes]))
                run = functools.partial(pool.map, peer_hits, jobs, chunksize=8)
                found[name] = [timed(lambda run=run: list(run())) for _ in range(num_samples)]
    return found


def write_requests(folder: Path, experts: Shaped[np.ndarray, "steps layers topk"]) -> list[str]:
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


def numpy_hits(
    name: str,
    experts: Shaped[np.ndarray, "steps layers topk"],
    profile: Profile,
    num_experts: int,
    slots: Int[np.ndarray, " capacities"],
) -> Int[np.ndarray, "layers capacities"]:
    """The replay of `moejax`, set at a time, by sorting every step's scores."""
    num_layers = experts.shape[1]
    lanes = (num_layers, len(slots), num_experts)
    resident, num_hits = np.zeros(lanes, bool), np.zeros(lanes[:2], np.int64)
    admit = np.ones((num_layers, num_experts), bool)
    if name == "top_k":
        best = np.argsort(-profile.num_uses, axis=-1, kind="stable")
        admit[:] = False
        np.put_along_axis(admit, best[:, : num_experts // 2], True, axis=-1)
    for demand, score in _scores(name, demanded(experts, num_experts), profile):
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


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
