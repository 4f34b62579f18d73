"""Timing the copies and the expert compute of the machine that this runs on."""

from typing import Any

from ._measure_compute import measure_compute
from ._measure_sample import Progress
from ._measure_transfer import measure_transfers


def measure_machine(
    *, quick: bool, seed: int, progress: Progress | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Measures what the cost model is fitted to, on whatever backend JAX has.

    All samples are kept; compilation is timed apart.

    Args:
      quick: Smaller sweeps: a few seconds instead of about twenty.
      seed: Seed of the data and of the order of the samples.
      progress: Told after each round of samples.

    Returns:
      Records by `transfer` (see `measure_transfers`) and `compute` (see `measure_compute`).
    """
    return {
        "transfer": measure_transfers(quick=quick, seed=seed, progress=progress),
        "compute": measure_compute(quick=quick, seed=seed, progress=progress),
    }
