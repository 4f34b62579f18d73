r"""Measures what more devices buy, each number of them in the same run.

    python scripts/bench_devices.py --out results.json --devices 1,2
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python scripts/bench_devices.py --out results.json --devices 1,2,8 --lanes 16 --shrink 64

Parts: `sweep`, the ranks of five strategies over lanes that the devices share; `timeline`, the same
with a clock; and `engine`, a model of random weights whose experts the devices share. The results
are written after every part, whole or not at all; a part that fails is named in them, leaves the
others as they are and makes the exit status 1.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from devices_engine import measure_engine
from devices_sweep import measure_sweep, measure_timeline
from simulator_traces import SEED

from moejax.errors import MoejaxError, UsageError
from moejax.results import capture_environment, to_plain, write_json

SCHEMA = "moejax.devices-bench/1"
# A part takes the options and gives its records.
PARTS: Mapping[str, Callable[[argparse.Namespace], Any]] = {
    "sweep": measure_sweep,
    "timeline": measure_timeline,
    "engine": measure_engine,
}


def main(arguments: list[str] | None = None) -> int:
    """Measures the parts asked for, one after another."""
    options = parse_options(arguments)
    try:
        check(options)
        results: dict[str, Any] = {
            "schema": SCHEMA,
            "environment": to_plain(capture_environment(SEED)),
            "device_counts": options.devices,
            "failed": {},
        }
        for part in options.parts:
            print(f"part {part}", file=sys.stderr, flush=True)
            # What a part has so far, should it not come to its end.
            options.save = lambda found, part=part: write_json(options.out, results | {part: found})
            try:
                results[part] = PARTS[part](options)
            except Exception as error:  # The others are worth having whatever became of this one.
                traceback.print_exc()
                results["failed"][part] = f"{type(error).__name__}: {error}"
            write_json(options.out, results)
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 1 if results["failed"] else 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, lists as lists."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(PARTS)
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--devices", type=_counts, default=[1, 2], help="with commas; [1,2]")
    parser.add_argument("--parts", type=_names, default=list(PARTS), help=f"of {names}; [all]")
    parser.add_argument("--repeats", type=int, default=5, help="warm samples of each [5]")
    parser.add_argument("--lanes", type=int, default=256, help="traces side by side [256]")
    parser.add_argument("--shrink", type=int, default=1, help="divides their steps [1]")
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b", help="card of the engine's model")
    parser.add_argument("--workload", default="qwen1.5-moe", help="or trace that is replayed")
    parser.add_argument("--layers", type=int, default=0, help="of the model; [all]")
    parser.add_argument("--dtype", default="bfloat16", help="of its weights [bfloat16]")
    parser.add_argument("--kernels", default="auto", help="of the engine [auto]")
    parser.add_argument("--batch-sizes", type=_counts, default=[1, 4, 16], help="[1,4,16]")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="of tune-cache --out")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot be measured before anything is.

    Raises:
      UsageError: A part is unknown, a number is out of range, or there are not so many devices.
    """
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UsageError(f"--parts: {', '.join(unknown)} unknown", f"Known: {', '.join(PARTS)}.")
    if min(options.repeats, options.lanes, options.shrink, *options.devices) < 1:
        raise UsageError("a number of devices, repeats, lanes or a divisor is below 1", "Use 1.")
    num_devices = len(jax.local_devices())
    if max(options.devices) > num_devices:
        raise UsageError(
            f"--devices {max(options.devices)}: there are {num_devices} of platform "
            f"{jax.default_backend()}",
            "Without accelerators XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight "
            "of a CPU.",
        )
    if odd := [count for count in options.devices if options.lanes % count]:
        raise UsageError(
            f"{options.lanes} lanes are not shared equally by {odd[0]} devices",
            "Use a number of lanes that all of them divide.",
        )


def _counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
