"""Times a model with random weights: decode steps, prompts, every way of computing experts.

    python scripts/bench_model.py --out results.json
    python scripts/bench_model.py --model tiny-moe --dtype float32 --parts experts --out cpu.json

Weights are drawn on the device, so the full Qwen1.5-MoE (28.6 GB) needs no checkpoint and no
host memory. Beside each time stands what the bytes and products would take at the rates of this
device, measured in the same run. Transformers is timed in a process of its own. The file is
rewritten after every result: a run that is cut short keeps what it has.

Parts: `decode` steps, the `baseline`, `prefill`, a sweep of the `experts` implementations, and
`fastest`: decode and prefill again where the sweep found something faster than the choice.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from model_timing import (
    CACHE_POSITIONS,
    CONTEXT,
    SEED,
    RandomModel,
    Row,
    draw_weights,
    measure_ceilings,
    time_decode,
    time_experts,
    time_prefill,
)

from moejax.cards import MODELS, models_dir, read_card
from moejax.errors import MoejaxError
from moejax.qwen_moe import EXPERTS, QwenMoeConfig, choose_experts, read_config, write_config
from moejax.results import Measurement, capture_environment, to_plain, write_json

PARTS = ("decode", "baseline", "prefill", "experts", "fastest")
BASELINE = Path(__file__).parent / "baselines" / "transformers_decode.py"
# Coarse first: what is cut off at the end is the finer grid.
SWEEP_TOKENS = (1, 4, 16, 64, 2048, 256, 2, 8, 32, 128, 512)
# Programs beyond would copy tens of gigabytes of weights, or take minutes to compile.
MOST_TOKENS = {"gather": 64, "unrolled": 16}
SLOWEST_S = 1.0


@dataclass
class Run:
    """Results so far, where they are kept, and when all of it is to have ended."""

    results: dict[str, Any]
    out: Path | None
    max_seconds: float
    started: float = field(default_factory=time.perf_counter)
    longest_s: dict[str, float] = field(default_factory=dict)

    def left_s(self) -> float:
        """Seconds until everything is to have ended."""
        return self.max_seconds - (time.perf_counter() - self.started)

    def attempt(self, part: str, case: Row, measure: Callable[[], Row]) -> Row:
        """Adds what `measure` returns, or why it does not, to the rows of a part.

        A case is expected to take what the longest of its part took, and a part's first case what
        decode did. One that would end too late is not started and leaves no row.
        """
        start_s = self.max_seconds - self.left_s()
        words = f"{start_s:6.1f} s  {part} {', '.join(str(value) for value in case.values())}"
        expected_s = self.longest_s.get(part, self.longest_s.get("decode", 0.0))
        if self.left_s() <= expected_s:
            print(f"{words}: not started, would take {expected_s:.1f} s", file=sys.stderr)
            return {}
        print(words, file=sys.stderr, flush=True)
        try:
            found = measure()
        except Exception as error:  # Out of memory, most likely; the other results count.
            found = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
        took_s = self.max_seconds - self.left_s() - start_s
        self.longest_s[part] = max(took_s, self.longest_s.get(part, 0.0))
        self.results.setdefault(part, []).append({**case, **found})
        self.save()
        return found

    def save(self) -> None:
        """Writes the file anew."""
        stats = jax.devices()[0].memory_stats() or {}
        self.results["elapsed_s"] = self.max_seconds - self.left_s()
        self.results["peak_device_bytes"] = stats.get("peak_bytes_in_use")
        if self.out is not None:
            write_json(self.out, self.results)


def main(argv: Sequence[str] | None = None) -> int:
    options = read_options(argv)
    # Half of the device is the baseline's, which runs while our weights stay where they are.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    try:
        config = read_model(options.model)
        if options.layers:
            config = dataclasses.replace(config, num_hidden_layers=options.layers)
        config = dataclasses.replace(config, dtype=options.dtype or config.dtype)
        run = Run(describe_run(options, config), options.out, options.max_seconds)
        run.save()
        measure(run, config, options)
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    if options.output == "json":
        print(json.dumps(to_plain(run.results)))
    else:
        print("\n".join(summary(run.results)))
    return 0


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    def parts(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(PARTS)
        if unknown:
            raise argparse.ArgumentTypeError(f"{min(unknown)!r} is not one of {', '.join(PARTS)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description="Times a model with random weights.")
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b", help="card, folder, config.json")
    parser.add_argument("--layers", type=int, help="take only so many layers")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights"
    )
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 4, 16])
    parser.add_argument("--prefill", type=numbers, default=[2048, 128], help="prompt lengths")
    parser.add_argument("--experts", default="auto", choices=["auto", *EXPERTS])
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"], help="of prompts")
    parser.add_argument("--sweep-tokens", type=numbers, default=list(SWEEP_TOKENS))
    parser.add_argument("--sweep-seconds", type=float, default=90, help="for all of the sweep")
    parser.add_argument("--window", type=int, default=16, help="steps between two readings")
    parser.add_argument("--num-windows", type=int, default=6)
    parser.add_argument("--parts", type=parts, default=list(PARTS))
    parser.add_argument(
        "--max-seconds", type=float, default=240, help="start nothing likely to end later"
    )
    parser.add_argument("--baseline-python", default=sys.executable, help="one that has torch")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser.parse_args(argv)


def read_model(name: str) -> QwenMoeConfig:
    path = models_dir() / f"{name}.toml" if name in MODELS else Path(name)
    fields = read_card(path / "config.json" if path.is_dir() else path)
    # Cards leave out what has no size.
    return read_config({"max_position_embeddings": 32768} | fields.get("config", fields), name)


def describe_run(options: argparse.Namespace, config: QwenMoeConfig) -> dict[str, Any]:
    places = {"out", "output", "baseline_python"}
    settings = {name: value for name, value in vars(options).items() if name not in places}
    return {
        "schema": "moejax.bench-model/1",
        "environment": capture_environment(SEED),
        "settings": {**settings, "context": CONTEXT, "cache_positions": CACHE_POSITIONS},
        "config": write_config(config),
    }


def measure(run: Run, config: QwenMoeConfig, options: argparse.Namespace) -> None:
    """Every part, what matters most first."""
    dtype, parts = jnp.dtype(config.dtype), options.parts
    ceilings = measure_ceilings(dtype)
    run.results["ceilings"] = ceilings
    start = time.perf_counter()
    model = draw_weights(config, dtype)
    num_bytes = sum(array.nbytes for array in model.weights)
    run.results["weights"] = {"num_bytes": num_bytes, "draw_s": time.perf_counter() - start}

    def decode(batch_size: int, experts: str) -> None:
        run.attempt(
            "decode",
            {"batch_size": batch_size, "experts": experts},
            lambda: time_decode(
                model, ceilings, batch_size, experts, options.window, options.num_windows
            ),
        )

    def prefill(num_tokens: int, experts: str) -> None:
        run.attempt(
            "prefill",
            {"num_tokens": num_tokens, "experts": experts, "attention": options.attention},
            lambda: time_prefill(model, ceilings, num_tokens, experts, options.attention),
        )

    for number, batch_size in enumerate(options.batch_sizes):
        if "decode" in parts:
            decode(batch_size, named(options.experts, batch_size))
        if "baseline" in parts and not number:
            case = {"implementation": "transformers"}
            run.attempt("baseline", case, lambda: time_baseline(run, options))
    for num_tokens in options.prefill if "prefill" in parts else ():
        prefill(num_tokens, named(options.experts, num_tokens))
    if "experts" in parts:
        sweep_experts(run, model, ceilings, options.sweep_tokens, options.sweep_seconds)
    if "fastest" in parts:
        best = fastest(run.results.get("experts", []))
        for again, sizes in ((decode, options.batch_sizes), (prefill, options.prefill)):
            for num_tokens in sizes:
                if best.get(num_tokens) not in (None, named(options.experts, num_tokens)):
                    again(num_tokens, best[num_tokens])


def named(experts: str, num_tokens: int) -> str:
    return choose_experts(num_tokens, jax.default_backend()) if experts == "auto" else experts


def time_baseline(run: Run, options: argparse.Namespace) -> Row:
    """Times transformers in a process of its own, which does not outlast this run."""
    limit_s = max(run.left_s(), 1.0)
    with tempfile.TemporaryDirectory() as folder:
        config = write_json(Path(folder) / "config.json", run.results["config"])
        arguments = {
            "batch-sizes": ",".join(map(str, options.batch_sizes)),
            "prefill": ",".join(map(str, options.prefill)),
            "context": CONTEXT,
            "window": options.window,
            "dtype": run.results["config"]["dtype"],
            # Ours need time, too.
            "max-seconds": limit_s / 2,
        }
        command = [options.baseline_python, str(BASELINE), str(config)]
        command += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = {} if done.returncode == 0 else {"error": done.stderr.strip()[-2000:]}
    return {"rows": [with_measurement(line) for line in lines], **failed}


def with_measurement(line: Row) -> Row:
    rest = {name: value for name, value in line.items() if name != "samples_s"}
    if "samples_s" not in line:
        return rest
    samples_s = tuple(line["samples_s"])
    return {**rest, line["kind"]: Measurement(f"transformers {line['kind']}", "s", samples_s)}


def sweep_experts(
    run: Run, model: RandomModel, ceilings: Row, token_counts: Sequence[int], max_seconds: float
) -> None:
    """Times one layer's experts in every way that can be fast, for each number of tokens."""
    least_left_s = run.left_s() - max_seconds
    slow: set[str] = set()
    for num_tokens in token_counts:
        for name in EXPERTS:
            if num_tokens > MOST_TOKENS.get(name, num_tokens) or name in slow:
                continue
            case = {"num_tokens": num_tokens, "implementation": name}
            if run.left_s() < least_left_s:
                print(f"the sweep ends before {case}", file=sys.stderr)
                return
            found = run.attempt(
                "experts",
                case,
                lambda n=num_tokens, name=name: time_experts(model, ceilings, n, name),
            )
            if "layer" in found and found["layer"].median > SLOWEST_S:
                slow.add(name)


def fastest(rows: Sequence[Row]) -> dict[int, str]:
    """The fastest implementation by number of tokens."""
    best: dict[int, Row] = {}
    for row in rows:
        before = best.get(row["num_tokens"])
        if "error" not in row and (before is None or row["layer"].median < before["layer"].median):
            best[row["num_tokens"]] = row
    return {num_tokens: best[num_tokens]["implementation"] for num_tokens in sorted(best)}


def summary(results: Mapping[str, Any]) -> list[str]:
    """What a person wants to see: medians in ms, and how many times a bound they are."""
    lines = [
        f"device    {results['environment'].device}",
        f"ceilings  {words(results['ceilings'])}",
    ]
    for part in PARTS:
        rows = [inner for row in results.get(part, []) for inner in row.get("rows", ()) or [row]]
        lines += [f"{part:9s} {words(row)}" for row in rows]
    best = fastest(results.get("experts", []))
    return [*lines, *(f"fastest   {name} for {count} tokens" for count, name in best.items())]


def words(row: Row) -> str:
    texts = []
    for name, value in row.items():
        if isinstance(value, Measurement):
            spread = f"{1e3 * value.p05:.4g}-{1e3 * value.p95:.4g}"
            texts.append(f"{name} {1e3 * value.median:.4g} ms ({spread})")
        else:
            texts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts)


if __name__ == "__main__":
    sys.exit(main())
