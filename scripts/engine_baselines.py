"""Runs what the engine is compared with, each in a process of its own, and reads its lines.

Used by `bench_engine.py`. The processes need torch, which moejax does not.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.qwen_moe import QwenMoeConfig, write_config
from moejax.results import write_json

FOLDER = Path(__file__).parent / "baselines"
# A process stops measuring before it would be stopped.
SHARE_RATIO = 0.8


class Baseline(NamedTuple):
    """What a baseline printed.

    Attributes:
      rows: What was timed, under the names of the engine's records.
      notes: Its other lines: its environment, and cases that failed.
      error: What went wrong with the process; empty if nothing did.
    """

    rows: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    error: str


def time_host_driven(
    python: str,
    config: QwenMoeConfig,
    routings: Sequence[np.ndarray],
    *,
    slots: int,
    context: int,
    distinct_layers: int,
    max_seconds: float,
) -> Baseline:
    """Times the host-driven loop on routing of one request."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--distinct-layers", str(distinct_layers), "--context", str(context)]
        for number, experts in enumerate(routings):
            path = Path(folder) / f"{number}.npz"
            np.savez(path, experts=experts)
            arguments += ["--case", f"1:{slots}:{path}"]
        arguments += ["--dtype", config.dtype]
        return _run(python, "host_driven_decode", config, folder, arguments, max_seconds)


def time_transformers(
    python: str,
    config: QwenMoeConfig,
    batch_sizes: Sequence[int],
    *,
    context: int,
    max_seconds: float,
) -> Baseline:
    """Times transformers with every expert on the device."""
    sizes = ",".join(str(size) for size in batch_sizes)
    arguments = ["--batch-sizes", sizes, "--context", str(context), "--dtype", config.dtype]
    with tempfile.TemporaryDirectory() as folder:
        return _run(python, "transformers_decode", config, folder, arguments, max_seconds)


def read_lines(text: str, script: str) -> list[dict[str, Any]]:
    """What a baseline printed, a row for each line that is an object."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [_row(line, script) for line in lines]


def _run(
    python: str,
    script: str,
    config: QwenMoeConfig,
    folder: str,
    arguments: Sequence[str],
    max_seconds: float,
) -> Baseline:
    path = write_json(Path(folder) / "config.json", write_config(config))
    command = [python, str(FOLDER / f"{script}.py"), str(path), *arguments]
    command += ["--max-seconds", str(SHARE_RATIO * max_seconds)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max_seconds, check=False
        )
        text, error = done.stdout, done.stderr.strip()[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        error = f"not done in {max_seconds:.0f} s"
    lines = read_lines(text, script)
    rows = [line for line in lines if "step_s" in line]
    notes = [line for line in lines if "step_s" not in line]
    return Baseline(rows, notes, error or ("" if rows else "it timed nothing"))


def _row(line: dict[str, Any], script: str) -> dict[str, Any]:
    row = {"system": "transformers", "batch_size": 1, "hit_ratio": 1.0, **line, "script": script}
    if "samples_s" in row:
        samples_s = row.pop("samples_s")
        row["step_s"] = {
            "median": float(np.median(samples_s)),
            "p95": float(np.percentile(samples_s, 95)),
            "samples": samples_s,
        }
    return row
