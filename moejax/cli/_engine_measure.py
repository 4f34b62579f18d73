"""What `moejax bench --engine` and its ladder share: measuring cases, and telling of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ._output import OutputFormat, emit
from ._progress import say, show_progress

if TYPE_CHECKING:
    from moejax.bench import EngineBench, EngineCase, Routing

    from ._engine_bench import EngineOptions

Fit: TypeAlias = Callable[[Path, dict[str, Any]], None]
"""Stores in a folder what fits a run."""


def measure_cases(
    bench: "EngineBench",
    cases: "Sequence[EngineCase]",
    results: dict[str, Any],
    options: "EngineOptions",
    folder: Path,
    output: OutputFormat,
    *,
    routings: "dict[tuple[str, int], Routing]",
    fit: Fit,
    prompts: Sequence[Sequence[int]] = (),
    marks: Sequence[dict[str, Any]] = (),
) -> None:
    """Measures the machine and every case, stores and prints them.

    Args:
      bench: What measures.
      cases: What is measured.
      results: Results so far, which grow.
      options: What was asked for.
      folder: Where results.json goes.
      output: Format on stdout.
      routings: What is replayed, by name and batch size.
      fit: Stores a profile fitted to what was measured of the machine.
      prompts: Where generation begins.
      marks: What is added to the record of each case.
    """
    from moejax.bench import EngineCase, measure_host_reads, measure_machine, run_cases
    from moejax.results import write_json

    path = folder / "results.json"
    places = {case: place for place, case in enumerate(cases)} if marks else {}

    def place_of(row: dict[str, Any]) -> int:
        # A command before this one may have measured others.
        return places.get(EngineCase(*(row[name] for name in EngineCase._fields)), -1)

    def save(results: dict[str, Any]) -> None:
        if marks:
            results["engine"].sort(key=place_of)
            for row in results["engine"]:
                row |= marks[place] if (place := place_of(row)) >= 0 else {}
        write_json(path, results)

    try:
        with show_progress("engine") as progress:
            if options.measure and "measured" not in results:
                results["measured"] = measure_machine(
                    quick=options.quick, seed=options.seed, progress=progress
                )
                layer = bench.rig.store.layers[0]
                results["measured"]["host_read"] = measure_host_reads(layer, seed=options.seed)
            run_cases(
                bench,
                cases,
                results,
                routings=routings,
                prompts=prompts,
                save=save,
                progress=progress,
            )
    except KeyboardInterrupt:
        num_done = len(results["engine"])
        say(f"interrupted: {num_done} of {len(cases)} cases are in {path}" if num_done else "")
        raise
    if options.measure:
        fit(folder, results)
    say(f"wrote {path} ({len(results['engine'])} cases), times measured")
    _warn(results)
    emit([_row(record) for record in results["engine"]], output)


def _warn(results: dict[str, Any]) -> None:
    for record in results["engine"]:
        case = f"{record['strategy']}, {record['slots']} slots, batch {record['batch_size']}"
        if record["bit_identical"] is False:
            say(f"warning: {case}: tokens or logits differ from those of the resident model")
        if record["simulator_counts_equal"] is False:
            say(f"warning: {case}: the simulator disagrees: {record['count_difference']}")
    if results["failed"]:
        say(f"warning: {len(results['failed'])} case(s) failed; results.json says why")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    fields = ("strategy", "slots", "scope", "batch_size", "routing", "hit_ratio")
    return {
        **{name: record[name] for name in fields},
        "misses_per_step": record["misses_per_step"],
        "late_per_step": record["late_per_step"],
        "fetched_bytes": record["fetched_bytes_per_step"],
        "step_s": record["step_s"]["median"],
        "p95_s": record["step_s"]["p95"],
        "bound_sum_s": record["bound_sum_s"],
        "bit_identical": record["bit_identical"],
        "simulator_counts_equal": record["simulator_counts_equal"],
    }
