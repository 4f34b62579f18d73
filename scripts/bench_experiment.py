"""Times the experiment of `moejax bench` as it is by default: 250 points on the timeline.

    python scripts/bench_experiment.py -o json

runs it in new processes, one after another: the first finds no compiled program on disk, the
others find those of the first, as a second command does. Every process says how long its parts
took and what its records hash to; the records of all must be the same to the last bit.

`experiment_s` is `run_grid`: drawing the requests of all runs, then each strategy. `process_s` is
the whole life of a process: Python, imports, the profile and what is learned from it as well. All
samples are kept; medians and the fastest stand beside them. `_cpu_s` are seconds of processor time,
which another program on the same cores changes little.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCHEMA = "moejax.experiment-bench/1"
SEED = 0
STRATEGIES = ("on_demand", "oracle", "multi_look", "top_k", "intelligent")
BATCH_SIZES = (1, 2, 4, 8, 16)
NUM_RUNS = 10
NUM_STEPS = 128

Sample = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", choices=["json", "table"], default="table")
    parser.add_argument("--samples", type=int, default=5, help="warm processes, at least 1")
    parser.add_argument("--runs", type=int, default=NUM_RUNS, help="draws of requests")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="steps that count")
    parser.add_argument("--once", action="store_true", help="in this process, and nothing else")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error(f"--samples {options.samples}: the warm figure needs at least 1")
    if options.once:
        print(json.dumps(run_once(options.runs, options.steps)))
        return
    results = measure(options.samples, options.runs, options.steps)
    if options.output == "json":
        print(json.dumps(results, indent=1))
    else:
        print_plain(results)


def run_once(num_runs: int, num_steps: int) -> Sample:
    """The experiment in this process."""
    start_s = time.perf_counter()
    from moejax.bench import GridSettings, learn, open_requests, run_grid
    from moejax.cards import load_hardware, load_model

    imported_s = time.perf_counter()
    model, hardware = load_model("qwen1.5-moe-a2.7b"), load_hardware("rtx-3090")
    settings = GridSettings(
        strategies=STRATEGIES,
        batch_sizes=BATCH_SIZES,
        num_runs=num_runs,
        slots=(model.num_experts // 2,) * model.num_moe_layers,
        num_steps=num_steps,
        seed=SEED,
    )
    requests = open_requests(None, "qwen1.5-moe", model, SEED)
    profile = learn(requests)
    prepared_s, prepared_cpu_s = time.perf_counter(), time.process_time()
    ends_s: dict[str, float] = {}
    records = run_grid(
        settings,
        model,
        hardware,
        requests,
        profile,
        progress=lambda done, total, label: ends_s.update({label: time.perf_counter()}),
    )
    ended_s, ended_cpu_s = time.perf_counter(), time.process_time()
    starts_s = [prepared_s, *ends_s.values()]
    return {
        "num_points": len(records),
        "records_sha256": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
        "import_s": imported_s - start_s,
        "prepare_s": prepared_s - imported_s,
        "experiment_s": ended_s - prepared_s,
        "experiment_cpu_s": ended_cpu_s - prepared_cpu_s,
        "parts_s": {
            label: end_s - begin_s
            for (label, end_s), begin_s in zip(ends_s.items(), starts_s, strict=False)
        },
    }


def measure(num_samples: int, num_runs: int, num_steps: int) -> dict[str, Any]:
    """One process without compiled programs, then some with those that it left."""
    from moejax.results import capture_environment, to_plain

    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = [
            run_process(Path(folder), num_runs, num_steps) for _ in range(1 + num_samples)
        ]
    hashes = {one["records_sha256"] for one in (cold, *warm)}
    return {
        "schema": SCHEMA,
        "environment": to_plain(capture_environment(SEED)),
        "num_points": cold["num_points"],
        "records_sha256": cold["records_sha256"],
        "records_equal": len(hashes) == 1,
        "cold": cold,
        "warm": summarise(warm),
        "warm_samples": warm,
    }


def run_process(cache: Path, num_runs: int, num_steps: int) -> Sample:
    """A new process whose compiled programs are kept where those of a command would be."""
    from moejax.cli._app import keep_programs

    environ = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    keep_programs(environ)
    options = ["--once", f"--runs={num_runs}", f"--steps={num_steps}"]
    load, start_s = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *options], env=environ, check=True, stdout=subprocess.PIPE
    )
    process_s = time.perf_counter() - start_s
    return {"load_before": load, "process_s": process_s, **json.loads(done.stdout)}


def summarise(samples: list[Sample]) -> dict[str, Any]:
    """Of each time its median, the fastest and the slowest."""
    times = {key: [one[key] for one in samples] for key in samples[0] if key.endswith("_s")}
    times |= {
        f"parts_s.{part}": [one["parts_s"][part] for one in samples]
        for part in samples[0]["parts_s"]
    }
    del times["parts_s"]
    return {
        key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for key, values in times.items()
    }


def print_plain(results: dict[str, Any]) -> None:
    """The figures, a line each."""
    same = "the same" if results["records_equal"] else "NOT the same"
    print(f"{results['num_points']} points, records {same} in every process:")
    print(f"  {results['records_sha256']}")
    print(f"cold: {results['cold']['experiment_s']:.2f} s, of {results['cold']['process_s']:.2f} s")
    for key, row in results["warm"].items():
        print(f"warm: {key:28} {row['median']:6.2f} ({row['min']:.2f} to {row['max']:.2f})")


if __name__ == "__main__":
    main()
