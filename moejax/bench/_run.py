"""One run of `moejax bench`: the experiment, the hit curves and this machine, in one record."""

import dataclasses
from typing import Any

from moejax.bench._curves import hit_curves
from moejax.bench._grid import GridSettings, Progress, run_grid
from moejax.bench._measure import measure_machine
from moejax.bench._requests import learn, open_requests
from moejax.bench.audit import run_audit
from moejax.bench.further import run_further
from moejax.cards import Hardware, ModelSpec
from moejax.results import capture_environment, to_plain
from moejax.trace import Trace

SCHEMA = "moejax.bench/1"
BASELINE = "lru"
"""Runs beside every experiment that leaves it out, for the reader to compare with."""


def run_bench(
    settings: GridSettings,
    model: ModelSpec,
    hardware: Hardware,
    *,
    trace: Trace | None = None,
    workload: str,
    measure: bool = True,
    quick: bool = False,
    num_devices: int = 1,
    audit: bool = False,
    further: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the experiment and returns the contents of `results.json`.

    Args:
      settings: The grid.
      model: Card of the model.
      hardware: Profile that gives the timeline its clock.
      trace: Recorded routing; None draws from `workload`.
      workload: Name of the synthetic workload.
      measure: Whether to time copies and compute of this machine as well.
      quick: Whether to time fewer sizes.
      num_devices: Devices that share the experiment; no number depends on it.
      audit: Whether to do the reference study's experiment as well and judge its claims.
      further: Whether to run what the study left open as well: cache sizes, cards, another model,
        hybrids and other values of K.
      progress: Told after each part.

    Raises:
      BadFileError: The trace is not this model's.
      UsageError: The workload is not this model's, a strategy needs what the trace lacks, or
        there are not so many devices.
    """
    requests = open_requests(trace, workload, model, settings.seed)
    profile = learn(requests)
    names = settings.strategies
    with_baseline = dataclasses.replace(
        settings, strategies=tuple(dict.fromkeys((*names, BASELINE)))
    )
    grid = run_grid(
        with_baseline,
        model,
        hardware,
        requests,
        profile,
        num_devices=num_devices,
        progress=progress,
    )
    curves = hit_curves(requests, profile, settings.strategies, settings.seed)
    measured = {"transfer": [], "compute": []}
    if measure:
        measured = measure_machine(quick=quick, seed=settings.seed, progress=progress)
    shown = requests.profile if requests.test is None else trace
    assert shown is not None
    results = {
        "schema": SCHEMA,
        "environment": to_plain(capture_environment(settings.seed)),
        "model": to_plain(model) | {"routed_bytes": model.routed_bytes},
        "hardware": to_plain(hardware),
        "trace": {
            "name": requests.workload if trace is None else (trace.model or "recorded"),
            "workload": requests.workload,
            "is_recorded": requests.workload is None,
            "source": shown.source,
            "licence": shown.licence,
            "sha256": shown.sha256,
            "num_tokens": shown.num_tokens,
            "num_requests": shown.num_requests,
            "num_test_tokens": None if requests.test is None else requests.test.num_tokens,
            "num_test_requests": None if requests.test is None else requests.test.num_requests,
        },
        "settings": dataclasses.asdict(settings),
        "grid": [record for record in grid if record["strategy"] in names],
        "baseline": [record for record in grid if record["strategy"] not in names],
        "hit_curve": curves,
        "measured": measured,
    }
    if audit:
        results |= run_audit(
            results,
            model,
            hardware,
            num_runs=settings.num_runs,
            seed=settings.seed,
            progress=progress,
        )
    if further:
        results |= run_further(with_baseline, model, hardware, requests, profile, progress=progress)
    return results
