"""Times the rank simulator beside libCacheSim and plain numpy, and compares what they count.

    python scripts/bench_simulator.py -o json

makes two traces from a fixed seed, sweeps five strategies over 8 and over 61 capacities of every
layer, and does the same with five policies of libcachesim (the extra `peers`) on one core and in
two processes. All times of a record are of one run on one machine; `ours_s` and the ratios are of
the fastest samples. libcachesim replays request by request, `moejax` a token's set at a time, so
cells are compared where both mean the same: one request an event. Every strategy is compared with
plain numpy, set at a time, on the first steps.

`--parts growth` streams 25, 50 and 100 million requests from a file; `--parts fill` sweeps as
many lanes as fill an accelerator, beside what its memory and its arithmetic would allow.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped
from simulator_limits import measure_fill, measure_growth
from simulator_peers import numpy_hits, peer_hits, peer_times, timed, write_requests
from simulator_traces import SEED, Geometry, make_experts, make_profile, make_strategies

from moejax.results import capture_environment, to_plain
from moejax.simulate import lru_hit_curve, ranks, stream
from moejax.strategies import Profile, Strategy, always_admit, lru, oracle

SCHEMA = "moejax.simulator-bench/1"
PARTS = ("sweeps", "growth", "fill")
# Shares of a layer's experts: 4, 8, 12, ... of 64; and every capacity from 4 to 64 of 64.
EIGHT = np.array([4, 8, 12, 16, 24, 32, 40, 48]) / 64
ALL = np.arange(4, 65) / 64
GEOMETRIES = (Geometry(24, 64, 20_000, 4), Geometry(48, 128, 5_000, 8))


def main(arguments: list[str] | None = None) -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", choices=["json", "table"], default="table")
    parser.add_argument("--parts", default="sweeps", help=f"of {', '.join(PARTS)}; with commas")
    parser.add_argument("--repeats", type=int, default=5, help="warm samples of ours")
    parser.add_argument("--peer-repeats", type=int, default=1, help="samples of libcachesim")
    parser.add_argument("--twin-steps", type=int, default=2000, help="steps of plain numpy")
    parser.add_argument("--lanes", type=int, default=64, help="traces side by side that fill")
    parser.add_argument("--shrink", type=int, default=1, help="divides the number of steps")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": to_plain(capture_environment(SEED)),
    }
    if "sweeps" in parts:
        results |= measure_sweeps(options)
    if "growth" in parts:
        say("growth")
        results["growth"] = measure_growth(options.repeats, options.shrink)
    if "fill" in parts:
        say("fill")
        results["fill"] = measure_fill(options.lanes, options.repeats, options.shrink)
    if options.output == "json":
        print(json.dumps(results, indent=1))
    else:
        print_plain(results)


def measure_sweeps(options: argparse.Namespace) -> dict[str, Any]:
    """Both traces, beside libcachesim where it is installed."""
    has_peer = importlib.util.find_spec("libcachesim") is not None
    if not has_peer:
        say("libcachesim is not installed: its times are null; install the extra `peers`")
    geometries = [one._replace(num_steps=one.num_steps // options.shrink) for one in GEOMETRIES]
    return {
        "peer": f"libcachesim {importlib.metadata.version('libcachesim')}" if has_peer else None,
        "records": [measure(geometry, options, has_peer) for geometry in geometries],
    }


def measure(geometry: Geometry, options: argparse.Namespace, has_peer: bool) -> dict[str, Any]:
    """Times and cells of one trace."""
    experts, profile = make_experts(geometry, 0), make_profile(geometry)
    strategies = make_strategies(profile)
    sweeps = []
    for shares in (EIGHT, ALL):
        slots = np.round(shares * geometry.num_experts).astype(int)
        say(f"{len(slots)} capacities of {geometry}")
        first_call_s, *samples = [
            timed(lambda slots=slots: sweep(strategies, experts, geometry, slots))
            for _ in range(1 + options.repeats)
        ]
        ours = {
            "num_capacities": len(slots),
            "first_call_s": first_call_s,
            "ours_s": min(samples),
            "ours_samples_s": samples,
        }
        theirs = peer_times(experts, slots, options.peer_repeats) if has_peer else {}
        sweeps.append(ours | beside(min(samples), theirs))
    # The first sample compiles.
    curves = [timed(lambda: lru_hit_curve(experts, geometry.num_experts)) for _ in range(6)][1:]
    return {
        **geometry._asdict(),
        "num_requests": experts.size,
        "sweeps": sweeps,
        "lru_all_s": min(curves),
        "lru_all_samples_s": curves,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **compare(strategies, profile, experts, geometry, options.twin_steps, has_peer),
    }


def beside(ours_s: float, theirs: dict[str, list[float]]) -> dict[str, Any]:
    """Their fastest times and how many times ours they are; null where they were not timed."""
    found: dict[str, Any] = {}
    for name in ("one_core", "two_processes"):
        samples = theirs.get(name)
        found[f"libcachesim_{name}_s"] = min(samples) if samples else None
        found[f"libcachesim_{name}_samples_s"] = samples
        found[f"ratio_{name}"] = min(samples) / ours_s if samples else None
    return found


def sweep(
    strategies: dict[str, Strategy],
    experts: Shaped[np.ndarray, "steps layers topk"],
    geometry: Geometry,
    slots: Int[np.ndarray, " capacities"],
) -> dict[str, Int[np.ndarray, "layers capacities"]]:
    """Hits of each strategy, from ids to counts."""
    source = stream(experts, geometry.num_experts)
    key = jax.random.key(0)
    return {
        name: ranks(strategy, source, slots, key, topk=experts.shape[-1]).num_hits
        for name, strategy in strategies.items()
    }


def compare(
    strategies: dict[str, Strategy],
    profile: Profile,
    experts: Shaped[np.ndarray, "steps layers topk"],
    geometry: Geometry,
    twin_steps: int,
    has_peer: bool,
) -> dict[str, Any]:
    """How many cells, a strategy, layer and capacity each, were compared and how many agree."""
    slots = np.round(EIGHT * geometry.num_experts).astype(int)
    short = experts[:twin_steps]
    found = sweep(strategies, short, geometry, slots)
    expected = {}

    def count():
        for name in strategies:
            expected[name] = numpy_hits(name, short, profile, geometry.num_experts, slots)

    numpy_s = timed(count)
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


def print_plain(value: Any, name: str = "") -> None:
    """One line a figure, under the names that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            print_plain(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            print_plain(inner, f"{name}[{number}]")
    else:
        print(f"{name}: {value}")


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
