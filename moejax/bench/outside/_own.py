"""Our own measured engine runs as the shipped profiles predict them, which saw none of them."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moejax.bench import ladder
from moejax.cards import load_hardware, models_dir
from moejax.results import read_json

_REPORTS = models_dir().parent / "reports"
_RATES = MappingProxyType(
    {
        "link_bytes_per_s": "pinned_h2d_bytes_per_s",
        "hbm_bytes_per_s": "vram_bytes_per_s",
        "flops_per_s": "matmul_flops",
    }
)
OWN_RUNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"h100": ("h100-engine", "h100-ladder"), "h200": ("h200-engine",)}
)
"""Folders of `reports/` with runs of the engine, by the profile of their card."""


def predict_own(profile: str, folder: Path = _REPORTS) -> list[dict[str, Any]]:
    """A record for every case and measured rate of the runs of a profile's card.

    A run whose folder is not there, as in an installed package, is left out.

    Returns:
      Records with `run`, `what`, `quantity` (`step`, or the rate's constant), `strategy`,
      `batch_size`, `measured`, `predicted` (seconds, or bytes or FLOP a second) and `error_ratio`.

    Raises:
      BadFileError: A run is unreadable, or the profile lacks a constant.
    """
    hardware = load_hardware(profile)
    records = []
    for run in OWN_RUNS.get(profile, ()):
        path = folder / run / "results.json"
        if not path.is_file():
            continue
        results = read_json(path)
        for rate, constant in _RATES.items():
            ours, measured = hardware.value(constant), results["ceilings"][rate]
            records.append(_record(run, constant, constant, None, None, measured, ours))
        for row in ladder(results, hardware, simulate=False):
            what = f"{row['strategy']}, {row['slots']} slots, {row['routing']}"
            measured, ours = row["measured_s"], row["predicted_s"]
            strategy, batch_size = row["strategy"], row["batch_size"]
            records.append(_record(run, what, "step", strategy, batch_size, measured, ours))
    return records


def summarise_own(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median and worst error of the steps of each run and batch size, and of each rate."""
    groups: dict[tuple[str, str, int | None], list[float]] = {}
    for record in records:
        key = (record["run"], record["quantity"], record["batch_size"])
        groups.setdefault(key, []).append(record["error_ratio"])
    return [
        {
            "run": run,
            "quantity": quantity,
            "batch_size": batch_size,
            "num_rows": len(errors),
            "median_error_ratio": statistics.median(map(abs, errors)),
            "worst_error_ratio": max(map(abs, errors)),
            "bias_ratio": statistics.median(errors),
        }
        for (run, quantity, batch_size), errors in groups.items()
    ]


def _record(
    run: str,
    what: str,
    quantity: str,
    strategy: str | None,
    batch_size: int | None,
    measured: float,
    predicted: float,
) -> dict[str, Any]:
    return {
        "run": run,
        "what": what,
        "quantity": quantity,
        "strategy": strategy,
        "batch_size": batch_size,
        "measured": measured,
        "predicted": predicted,
        "error_ratio": predicted / measured - 1,
    }
