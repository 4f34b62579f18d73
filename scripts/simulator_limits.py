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

from moejax.simulate import _rank_blocks as rank_blocks
from moejax.simulate import ranks, stream
from moejax.simulate._blocks import BLOCK_STEPS, block_at
from moejax.simulate._select import Steps, no_tally
from moejax.simulate._words import (
    WORD_BITS,
    intersect,
    keep_words,
    num_members,
    num_rank_bits,
    unite,
)
from moejax.strategies import CacheShape, lru, oracle

LONG = Geometry(24, 64, 1_041_667, 4)
WIDE = Geometry(48, 128, 2_048, 8)
GROWTH_SLOTS = np.array([4, 8, 12, 16, 24, 32, 40, 48])
_SEGMENT_STEPS = 20_000
_TWIN_STEPS, _TWIN_LANES = 32, 2
_ARRAY_BYTES = 2**29
_NUM_WORDS, _NUM_TURNS = 2**22, 256
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

    Beside it what no program of this form can beat on this device: the word operations of the
    ranks and the selects at the measured rate of such operations, and the bytes of scores and
    rank planes, each written once and read once, at the measured rate of memory.
    """
    geometry = WIDE._replace(num_steps=WIDE.num_steps // shrink)
    experts = draw_lanes(geometry, num_lanes)
    slots = np.arange(1, geometry.num_experts + 1)
    profile = make_profile(geometry)
    keys = jax.random.split(jax.random.key(0), num_lanes)
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
    total_s = sum(row["ours_s"] for row in rows)
    num_rows = geometry.num_steps * num_lanes * geometry.num_layers
    return {
        **geometry._asdict(),
        "num_lanes": num_lanes,
        "num_capacities": len(slots),
        "num_request_capacities": num_request_capacities,
        "strategies": rows,
        "request_capacities_per_s": len(rows) * num_request_capacities / total_s,
        **_bounds(geometry.num_experts, num_rows, len(slots)),
        "stages": measure_stages(geometry, experts, slots, num_samples),
        **_compared(geometry, experts[:_TWIN_STEPS, :_TWIN_LANES], profile),
    }


def measure_stages(geometry: Geometry, experts, slots, num_samples: int) -> dict[str, Any]:
    """What each stage of `lru` takes by itself, block for block; in a replay they overlap."""
    source, strategy = stream(experts, geometry.num_experts, with_future=False), lru()
    layers, num_experts = geometry.num_layers, geometry.num_experts
    shape = CacheShape(layers, num_experts, geometry.topk, min(3, layers - 1))
    kind = rank_blocks.Kind(strategy, shape, is_stream=True, resets=False)
    num_lanes = experts.shape[1]
    key = jax.random.split(jax.random.key(0), num_lanes)
    state = rank_blocks._copies(strategy.init(shape), num_lanes)
    is_reset = np.zeros(BLOCK_STEPS, bool)
    block = block_at(source, 0, with_future=False, with_gates=False)
    cells = jnp.broadcast_to(jnp.asarray(slots, jnp.int32)[None], (num_lanes * layers, len(slots)))
    words = (jnp.zeros(cells.shape, jnp.uint32),) * -(-num_experts // WORD_BITS)
    seen = tuple(word[:, 0] for word in words)

    def score():
        return rank_blocks._score_block(kind, state, block, is_reset, key)

    _, scores, demand, _ = score()

    def rank():
        return rank_blocks._plane_block(None, scores)

    steps = Steps(demand, rank(), None, None, None)

    def select():
        how = rank_blocks.how_to_select()
        return rank_blocks._select_block(None, how, words, seen, no_tally(cells), steps, cells)

    found: dict[str, Any] = {"strategy": "lru", "num_blocks": -(-len(experts) // BLOCK_STEPS)}
    for name, run in {"score": score, "rank": rank, "select": select}.items():
        jax.block_until_ready(run())
        fastest = min(
            timed(lambda run=run: jax.block_until_ready(run())) for _ in range(num_samples)
        )
        found[f"{name}_s"] = found["num_blocks"] * fastest
    return found


def _bounds(num_experts: int, num_rows: int, num_capacities: int) -> dict[str, float]:
    """Seconds that a replay takes at least, and the rates that say so."""
    num_words, num_planes = -(-num_experts // WORD_BITS), num_rank_bits(num_experts)
    # Ranks compare every expert with every other and add one; a score is four bytes.
    num_operations = num_rows * (2 * num_experts**2 + num_capacities * operations_of(num_experts))
    num_bytes = 2 * num_rows * 4 * (num_experts + num_planes * num_words)
    operations_per_s, bytes_per_s = _operation_rate(), _read_write_rate()
    return {
        "select_operations": operations_of(num_experts),
        "operations_per_s": operations_per_s,
        "operation_bound_s": num_operations / operations_per_s,
        "read_write_bytes_per_s": bytes_per_s,
        "memory_bound_s": num_bytes / bytes_per_s,
    }


def operations_of(num_experts: int) -> int:
    """Word operations of one select with its hits, as the program spells them."""
    words = (jnp.uint32(0),) * -(-num_experts // WORD_BITS)
    planes = (words,) * num_rank_bits(num_experts)

    def select(resident, demand, planes, slots, num_hits):
        num_hits = num_hits + num_members(intersect(resident, demand))
        return keep_words(unite(resident, demand), planes, slots), num_hits

    traced = jax.make_jaxpr(select)(words, words, planes, jnp.int32(1), jnp.int32(0))
    free = {"convert_element_type", "broadcast_in_dim", "pjit", "jit"}
    return sum(equation.primitive.name not in free for equation in _equations(traced.jaxpr))


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


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


def _operation_rate() -> float:
    """Word operations a second when nothing is fetched: exclusive or and add, in turn."""

    @jax.jit
    def churn(word, first, second):
        for _ in range(_NUM_TURNS):
            word = (word ^ first) + second
        return word

    word = jnp.arange(_NUM_WORDS, dtype=jnp.uint32)
    first, second = word * 3, word * 5 + 1

    def run():
        jax.block_until_ready([churn(word, first, second) for _ in range(_NUM_CALLS)])

    run()
    num_operations = _NUM_CALLS * _NUM_WORDS * _NUM_TURNS * 2
    return num_operations / min(timed(run) for _ in range(5))
