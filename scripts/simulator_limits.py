"""How far the ranks reach: traces of a hundred million requests, and lanes that fill a GPU."""

import functools
import itertools
import resource
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from simulator_peers import numpy_hits, timed
from simulator_traces import (
    SEED,
    Geometry,
    draw_lanes,
    make_experts,
    make_profile,
    make_strategies,
)

from moejax.simulate import ranks, stream
from moejax.simulate._words import intersect, keep_words, num_members, num_rank_bits, unite
from moejax.strategies import lru, oracle

LONG = Geometry(24, 64, 1_041_667, 4)
WIDE = Geometry(48, 128, 2_048, 8)
GROWTH_SLOTS = np.array([4, 8, 12, 16, 24, 32, 40, 48])
_SEGMENT_STEPS = 20_000
_TWIN_STEPS, _TWIN_LANES = 32, 2
_ARRAY_BYTES = 2**29
_REGISTER_LANES, _NUM_SELECTS = 2**20, 8
# Programs in flight in one sample, so that none waits for its launch.
_NUM_CALLS = 8


# --- long traces ------------------------------------------------------------------------------


def measure_growth(num_samples: int, shrink: int) -> dict[str, Any]:
    """Times of two strategies on a trace, on half of it and on a quarter, read from a file.

    The trace repeats 20,000 steps with the experts of each layer renamed every time, so that no
    repetition sees what the one before left in the cache as its own.
    """
    geometry = LONG._replace(num_steps=LONG.num_steps // shrink)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.npy"
        write_long(path, geometry)
        experts = np.load(path, mmap_mode="r")
        run = functools.partial(_sweep_long, geometry.num_experts)
        run(experts[: geometry.num_steps // 16])  # Compiles.
        lengths = [geometry.num_steps // share for share in (4, 2, 1)]
        samples: dict[int, list[float]] = {length: [] for length in lengths}
        # In turn, so that a disturbance of the machine meets all lengths.
        for _, length in itertools.product(range(num_samples), lengths):
            part = experts[:length]
            samples[length].append(timed(lambda part=part: run(part)))
        for length in lengths:
            num_requests = experts[:length].size
            fastest = min(samples[length])
            rows.append(
                {
                    "num_requests": num_requests,
                    "ours_s": fastest,
                    "ours_samples_s": samples[length],
                }
            )
    times = [row["ours_s"] for row in rows]
    return {
        **geometry._asdict(),
        "strategies": ["lru", "oracle"],
        "num_capacities": len(GROWTH_SLOTS),
        "lengths": rows,
        "doubling_ratios": [later / earlier for earlier, later in itertools.pairwise(times)],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def write_long(path: Path, geometry: Geometry) -> None:
    """A trace of any length, without holding it."""
    layers, num_experts, num_steps, topk = geometry
    segment = make_experts(geometry._replace(num_steps=min(_SEGMENT_STEPS, num_steps)), 0)
    table = np.lib.format.open_memmap(path, "w+", np.uint8, (num_steps, layers, topk))
    generator = np.random.default_rng(SEED)
    rows = np.arange(layers)[None, :, None]
    for start in range(0, num_steps, len(segment)):
        names = np.stack([generator.permutation(num_experts) for _ in range(layers)])
        here = segment[: num_steps - start]
        table[start : start + len(here)] = names.astype(np.uint8)[rows, here]
    table.flush()


def _sweep_long(num_experts: int, experts) -> None:
    source = stream(experts, num_experts)
    for strategy in (lru(), oracle()):
        ranks(strategy, source, GROWTH_SLOTS, jax.random.key(0), topk=experts.shape[-1])


# --- wide sweeps ------------------------------------------------------------------------------


def measure_fill(num_lanes: int, num_samples: int, shrink: int) -> dict[str, Any]:
    """Request-capacities a second of each strategy over many lanes and every capacity.

    Beside it the same selects with nothing to fetch, and the bytes that a step must move at the
    rate at which this device reads and writes: no program of this form can be faster.
    """
    geometry = WIDE._replace(num_steps=WIDE.num_steps // shrink)
    experts = draw_lanes(geometry, num_lanes)
    slots = np.arange(1, geometry.num_experts + 1)
    profile = make_profile(geometry)
    keys = jax.random.split(jax.random.key(0), num_lanes)
    num_cells = num_lanes * geometry.num_layers * len(slots)
    num_request_capacities = experts.size * len(slots)
    rows = []
    for name, strategy in make_strategies(profile).items():
        source = stream(experts, geometry.num_experts, with_future=strategy.reads_future)

        def sweep(strategy=strategy, source=source):
            return ranks(strategy, source, slots, keys, topk=geometry.topk)

        first_call_s, *samples = [timed(sweep) for _ in range(1 + num_samples)]
        rows.append(
            {
                "strategy": name,
                "first_call_s": first_call_s,
                "ours_s": min(samples),
                "ours_samples_s": samples,
                "request_capacities_per_s": num_request_capacities / min(samples),
            }
        )
    bytes_per_s, selects_per_s = _read_write_rate(), _select_rate(geometry.num_experts)
    step_bytes = num_cells * _bytes_of_a_cell(geometry.num_experts)
    total_s = sum(row["ours_s"] for row in rows)
    num_selects = geometry.num_steps * num_cells
    return {
        **geometry._asdict(),
        "num_lanes": num_lanes,
        "num_capacities": len(slots),
        "num_request_capacities": num_request_capacities,
        "strategies": rows,
        "request_capacities_per_s": len(rows) * num_request_capacities / total_s,
        "read_write_bytes_per_s": bytes_per_s,
        "memory_bound_s": geometry.num_steps * step_bytes / bytes_per_s,
        "selects_in_registers_per_s": selects_per_s,
        "select_bound_s": num_selects / selects_per_s,
        **_compared(geometry, experts[:_TWIN_STEPS, :_TWIN_LANES], profile),
    }


def _compared(geometry: Geometry, experts, profile) -> dict[str, int]:
    """Cells of the first steps of some lanes, and how many agree with plain numpy."""
    slots = np.arange(1, geometry.num_experts + 1)
    keys = jax.random.split(jax.random.key(0), experts.shape[1])
    num_cells = num_equal = 0
    for name, strategy in make_strategies(profile).items():
        source = stream(experts, geometry.num_experts)
        found = ranks(strategy, source, slots, keys, topk=geometry.topk).num_hits
        for lane, ours in enumerate(found):
            theirs = numpy_hits(name, experts[:, lane], profile, geometry.num_experts, slots)
            num_cells, num_equal = num_cells + ours.size, num_equal + int((ours == theirs).sum())
    return {"cells": num_cells, "cells_equal": num_equal}


def _bytes_of_a_cell(num_experts: int) -> int:
    """What a step reads and writes of a layer at one capacity: the residents and a count."""
    num_words = -(-num_experts // 32)
    return 2 * 4 * (num_words + 1)


def _read_write_rate() -> float:
    """Bytes a second, read and written, of adding one to a large array in place."""
    add = jax.jit(lambda old: old + 1, donate_argnums=0)
    array = [jnp.zeros(_ARRAY_BYTES // 4, jnp.uint32)]

    def run():
        for _ in range(_NUM_CALLS):
            array[0] = add(array[0])
        jax.block_until_ready(array[0])

    run()
    return 2 * _ARRAY_BYTES * _NUM_CALLS / min(timed(run) for _ in range(5))


def _select_rate(num_experts: int) -> float:
    """Selects a second, with their hits, when all that a select needs is in registers."""
    num_words = -(-num_experts // 32)
    generator = np.random.default_rng(SEED)

    def words(number, lanes):
        drawn = generator.integers(0, 2**32, (number, num_words, lanes), np.uint32)
        return [tuple(jnp.asarray(word) for word in one) for one in drawn]

    planes = words(num_rank_bits(num_experts), 1)
    demands, (resident,) = words(_NUM_SELECTS, 1), words(1, _REGISTER_LANES)
    slots = jnp.asarray(generator.integers(1, num_experts + 1, _REGISTER_LANES), jnp.int32)

    @jax.jit
    def select(resident, planes, demands, slots):
        hits = jnp.zeros_like(slots)
        for demand in demands:
            hits = hits + num_members(intersect(resident, demand))
            resident = keep_words(unite(resident, demand), planes, slots)
        return resident, hits

    def run():
        found = [select(resident, planes, demands, slots) for _ in range(_NUM_CALLS)]
        jax.block_until_ready(found)

    run()
    num_selects = _NUM_CALLS * _NUM_SELECTS * _REGISTER_LANES
    return num_selects / min(timed(run) for _ in range(5))
