"""The simulators on one device and on several that share the lanes: same work, same bits."""

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped
from simulator_traces import Geometry, draw_lanes, make_profile, make_strategies

from moejax.bench import simulate_lanes
from moejax.cards import load_hardware, load_model
from moejax.cost import layer_clock
from moejax.results import Measurement
from moejax.simulate import ranks, replay, stream
from moejax.strategies import intelligent, lru

# A second or so of an H100 at 256 lanes and 128 capacities, for each strategy.
WIDE = Geometry(48, 128, 4_096, 8)
# The timeline goes through one event after another, so that it is the lanes that fill a device.
CLOCKED_MODEL, CLOCKED_HARDWARE, CLOCKED_STEPS = "qwen1.5-moe-a2.7b", "h200", 64
CLOCKED = {"lru": lru, "intelligent": intelligent}

Run = Callable[[int], Any]
Program = tuple[str, dict[str, Any], Run]
"""Name of the strategy, size of the work, and the work on so many devices."""


def measure_sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ranks: a record a strategy and number of devices, and their sums as strategy `all`."""
    return _measured(_ranked(options), options)


def measure_timeline(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of the timeline, without prefetches and with them."""
    return _measured(_clocked(options), options)


def _measured(programs: Iterator[Program], options: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for strategy, work, run in programs:
        records += compare(strategy, work, run, options.devices, options.repeats)
    return records + _added_up(records)


def compare(
    strategy: str, work: dict[str, Any], run: Run, device_counts: list[int], num_samples: int
) -> list[dict[str, Any]]:
    """Times one program on each number of devices and compares what it returns, bit by bit.

    Compiling is apart, in `first_call_s`. Samples of the numbers of devices take turns, so that a
    disturbance of the machine meets all of them.
    """
    first_call_s, digests = {}, {}
    for count in device_counts:
        first_call_s[count], found = _timed(run, count)
        digests[count] = digest(found)
        _say(f"{strategy} on {count}: first call {first_call_s[count]:.2f} s")
    samples: dict[int, list[float]] = {count: [] for count in device_counts}
    for _ in range(num_samples):
        for count in device_counts:
            samples[count].append(_timed(run, count)[0])
    base = device_counts[0]
    return [
        {
            "strategy": strategy,
            **work,
            "num_devices": count,
            "first_call_s": first_call_s[count],
            **_times(samples[count], samples[base]),
            "base_devices": base,
            "sha256": digests[count],
            "is_identical": digests[count] == digests[base],
        }
        for count in device_counts
    ]


def digest(found: Any) -> str:
    """SHA-256 of every array of a result, with its shape and type."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(found):
        array = np.ascontiguousarray(leaf)
        total.update(f"{array.shape}{array.dtype}".encode())
        total.update(array.data)
    return total.hexdigest()


def _times(samples_s: list[float], base_s: list[float]) -> dict[str, Any]:
    median_s = statistics.median(samples_s)
    _say(f"    {median_s:.3f} s, from {min(samples_s):.3f} to {max(samples_s):.3f}")
    return {
        "run_s": Measurement("run", "s", tuple(samples_s)),
        "median_s": median_s,
        "speedup_ratio": statistics.median(base_s) / median_s,
    }


def _added_up(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All strategies one after another, sample by sample."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["num_devices"], []).append(record)
    sums = {
        count: np.sum([one["run_s"].samples for one in group], axis=0).tolist()
        for count, group in groups.items()
    }
    return [
        {
            "strategy": "all",
            "num_devices": count,
            "first_call_s": sum(one["first_call_s"] for one in group),
            **_times(sums[count], sums[group[0]["base_devices"]]),
            "base_devices": group[0]["base_devices"],
            "is_identical": all(one["is_identical"] for one in group),
        }
        for count, group in groups.items()
    ]


def _ranked(options: argparse.Namespace) -> Iterator[Program]:
    geometry = WIDE._replace(num_steps=WIDE.num_steps // options.shrink)
    experts = draw_lanes(geometry, options.lanes)
    slots = np.arange(1, geometry.num_experts + 1)
    keys = jax.random.split(jax.random.key(0), options.lanes)
    size = {
        **geometry._asdict(),
        "num_lanes": options.lanes,
        "num_request_capacities": experts.size * len(slots),
    }
    for name, strategy in make_strategies(make_profile(geometry)).items():
        source = stream(experts, geometry.num_experts, with_future=strategy.reads_future)

        def count(num_devices: int, strategy=strategy, source=source):
            return ranks(strategy, source, slots, keys, topk=geometry.topk, num_devices=num_devices)

        yield name, size, count


def _clocked(options: argparse.Namespace) -> Iterator[Program]:
    model, hardware = load_model(CLOCKED_MODEL), load_hardware(CLOCKED_HARDWARE)
    layers, num_experts = model.num_moe_layers, model.num_experts
    num_steps = max(1, CLOCKED_STEPS // options.shrink)
    geometry = Geometry(layers, num_experts, num_steps, model.num_experts_per_tok)
    experts: Shaped[np.ndarray, "steps lanes layers topk"] = draw_lanes(geometry, options.lanes)
    lanes = [
        replay(experts[:, lane], num_experts, with_future=False) for lane in range(options.lanes)
    ]
    clocks = [layer_clock(hardware, model, batch_size=1)] * options.lanes
    slots = np.full((options.lanes, layers), num_experts // 2, np.int32)
    # One object for all calls of a strategy, since another one would be compiled anew.
    for name, strategy in [(name, make()) for name, make in CLOCKED.items()]:

        def replay_all(num_devices: int, strategy=strategy):
            return simulate_lanes(
                strategy,
                lanes,
                clocks,
                slots,
                seeds=range(options.lanes),
                topk=geometry.topk,
                num_devices=num_devices,
            )

        yield name, {**geometry._asdict(), "num_lanes": options.lanes}, replay_all


def _timed(run: Run, num_devices: int) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = run(num_devices)
    return time.perf_counter() - begin, found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
