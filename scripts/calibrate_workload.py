"""Measures the calibrated workloads, and refits those that are named.

    python scripts/calibrate_workload.py                      measure the cards, two minutes
    python scripts/calibrate_workload.py --model olmoe-1b-7b  refit that card first, minutes more
    python scripts/calibrate_workload.py --check              measure on other requests
    python scripts/calibrate_workload.py --recorded FOLDER    rank strategies beside recordings too

A refit starts from the parameters in the card, so a second one moves them little. All but --check
write the cards in `models/workloads/` and `reports/workload-calibration/`. The recordings are other
people's and no part of the project; without --recorded the rankings found before are kept, and
refused where a card has changed since.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report_workloads as report
from _workload_rankings import rank_beside

from moejax.cards import models_dir
from moejax.errors import MoejaxError, UsageError
from moejax.results import capture_environment, read_json, to_plain, write_json, write_text
from moejax.trace import statistics
from moejax.workloads import (
    WORKLOADS,
    Workload,
    as_one_layer,
    assess,
    calibrate,
    default_workload,
    deviations,
    first_touch_ratio,
    lfu_hit_ratio,
    lru_hit_ratio,
    make_trace,
    oracle_hit_ratio,
    tolerance,
)

FIT_SEED, REPORT_SEED, CHECK_SEED = 0, 77, 2024
# Enough for the largest batch that has a target for its distinct experts.
NUM_FIT_REQUESTS, NUM_BATCH_REQUESTS = 4, 8
NEARLY_ALL = 0.99


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, refits or checks; 1 when a gated figure is out of its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="card to refit; repeatable")
    parser.add_argument("--check", action="store_true", help="refit and write nothing")
    parser.add_argument("--recorded", type=Path, help="folder of recorded routing")
    options = parser.parse_args(argv)
    try:
        measured = _measure(options.model, CHECK_SEED if options.check else REPORT_SEED)
        if not options.check:
            _write(measured, options.recorded)
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    for workload in measured:
        print(f"{workload.name}\n\n{report.table(to_plain(_record(workload)))}\n")
    missed = [line for workload in measured for line in _gate_failures(workload)]
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(missed))


def _measure(refitted: list[str], seed: int) -> list[Workload]:
    targeted = {name: workload for name, workload in WORKLOADS.items() if workload.targets}
    for name in refitted:
        if name not in targeted:
            raise UsageError(f"--model {name!r} has no targets", f"Known: {', '.join(targeted)}.")
    measured = []
    for name, workload in targeted.items():
        if name in refitted:
            print(f"fitting {name} ...", file=sys.stderr)
            is_batched = "distinct_experts" in workload.targets
            num_requests = NUM_BATCH_REQUESTS if is_batched else NUM_FIT_REQUESTS
            workload = calibrate(workload, seed=FIT_SEED, num_requests=num_requests)
        print(f"measuring {name} ...", file=sys.stderr)
        measured.append(dataclasses.replace(workload, achieved=assess(workload, seed=seed)))
    return measured


def _gate_failures(workload: Workload) -> list[str]:
    missed = []
    for path, miss in deviations(workload.targets, workload.achieved):
        limit = tolerance(workload, path)
        if limit is not None and abs(miss) > limit:
            missed.append(f"{workload.name} {' '.join(map(str, path))}: {miss:+.3f}")
    return missed


def _write(measured: list[Workload], recorded: Path | None) -> None:
    path = report.FOLDER / "results.json"
    named = {workload.name: workload for workload in measured}
    environment = capture_environment(FIT_SEED)
    if recorded is None:
        rankings = _kept_rankings(path, measured)
    else:
        # Kept through later runs, so each says when and with what it was found.
        found_by = {"commit": environment.commit, "date": environment.date}
        rankings = [{**found, **found_by} for found in rank_beside(recorded, named)]
    for workload in measured:
        write_text(models_dir() / "workloads" / f"{workload.name}.toml", _card(workload))
    study = named["reference-study"]
    others = [workload for workload in WORKLOADS.values() if not workload.targets]
    write_json(
        path,
        {
            "schema": report.SCHEMA,
            "environment": environment,
            "seeds": {"fit": FIT_SEED, "report": REPORT_SEED},
            "default_workload": default_workload,
            "workloads": {workload.name: _record(workload) for workload in measured},
            "curves": _curves(named[default_workload]),
            "pooling": {name: _pooling(workload) for name, workload in named.items()},
            "reference-study without locality": assess(_without_locality(study), seed=REPORT_SEED)[
                "hit_ratio"
            ],
            "switch": _slots_for(named["switch-base-128"]),
            "not calibrated": {workload.name: _describe(workload) for workload in others},
            "rankings": rankings,
        },
    )
    report.write(report.FOLDER)


def _kept_rankings(path: Path, measured: list[Workload]) -> list[dict[str, Any]]:
    kept = read_json(path).get("rankings", []) if path.exists() else []
    parameters = {workload.name: dict(workload.parameters) for workload in measured}
    for ranking in kept:
        if ranking["parameters"] != parameters[ranking["workload"]]:
            raise UsageError(
                f"the rankings of {ranking['workload']} were found with other parameters",
                "Find them again with --recorded FOLDER.",
            )
    return kept


def _card(workload: Workload) -> str:
    lines = ["# parameters and achieved are written by scripts/calibrate_workload.py."]
    for field in dataclasses.fields(workload):
        value = getattr(workload, field.name)
        if not isinstance(value, Mapping) and value != field.default:
            lines.append(f"{field.name} = {_toml(value)}")
    lines += ["", "[parameters]", *_rows(workload.parameters)]
    for table in ("targets", "achieved"):
        for measure, figures in getattr(workload, table).items():
            lines += ["", f"[{table}.{measure}]", *_rows(figures)]
    return "\n".join(lines) + "\n"


def _rows(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in table.items()]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(float(f"{value:.5g}")) if isinstance(value, float) else json.dumps(value)


def _record(workload: Workload) -> dict[str, Any]:
    fields = (
        *("title", "model", "num_layers", "num_experts", "num_experts_per_tok"),
        *("source", "note", "parameters", "fitted", "targets", "achieved"),
    )
    misses = dict(deviations(workload.targets, workload.achieved))
    return {
        **{name: getattr(workload, name) for name in fields},
        "deviations": {" ".join(map(str, path)): miss for path, miss in misses.items()},
        "tolerances": {" ".join(map(str, path)): tolerance(workload, path) for path in misses},
    }


def _draw(workload: Workload, num_requests: int) -> np.ndarray:
    trace = make_trace(
        workload, num_requests=num_requests, tokens_per_request=512, seed=REPORT_SEED
    )
    return trace.experts.reshape(num_requests, 512, *trace.experts.shape[1:])


def _curves(workload: Workload) -> dict[str, Any]:
    """Warm hit ratios of the default workload at every other number of slots, for the figure."""
    experts, num_experts = _draw(workload, 8), workload.num_experts
    slots = tuple(range(0, num_experts + 1, 2))
    free = first_touch_ratio(experts, num_experts)[list(slots)]
    curves = {
        "oracle": oracle_hit_ratio(experts, num_experts, slots),
        "lru": lru_hit_ratio(experts, num_experts)[list(slots)],
        "lfu": lfu_hit_ratio(experts, num_experts)[list(slots)],
    }
    return {"slots": slots, **{name: curve + free for name, curve in curves.items()}}


def _pooling(workload: Workload) -> dict[str, dict[str, float]]:
    """Warm hit ratios at twice top-k: slots of each layer beside one pool of as many."""
    experts, num_layers = _draw(workload, 2), workload.num_layers
    slots = 2 * workload.num_experts_per_tok
    scopes = {
        "layer": (experts, workload.num_experts, slots),
        "pool": (
            as_one_layer(experts, workload.num_experts),
            workload.num_experts * num_layers,
            slots * num_layers,
        ),
    }
    found = {}
    for scope, (routed, num_experts, count) in scopes.items():
        free = first_touch_ratio(routed, num_experts)[count]
        found[scope] = {
            "lru": lru_hit_ratio(routed, num_experts)[count] + free,
            "oracle": oracle_hit_ratio(routed, num_experts, (count,))[0] + free,
        }
    return found


def _slots_for(workload: Workload) -> dict[str, Any]:
    """Fewest slots a layer with which nearly all demands hit, first touches forgiven."""
    experts, num_experts = _draw(workload, 8), workload.num_experts
    slots = tuple(range(num_experts + 1))
    free = first_touch_ratio(experts, num_experts)
    curves = {
        "lru": lru_hit_ratio(experts, num_experts) + free,
        "oracle": oracle_hit_ratio(experts, num_experts, slots) + free,
    }
    fewest = {name: int(np.argmax(curve >= NEARLY_ALL)) for name, curve in curves.items()}
    return {"hit_ratio_warm": NEARLY_ALL, "num_experts": num_experts, "slots": fewest}


def _describe(workload: Workload) -> dict[str, Any]:
    """A few figures of a workload without targets, for the record."""
    trace = make_trace(workload, num_requests=16, tokens_per_request=128, seed=REPORT_SEED)
    experts = trace.experts.reshape(16, 128, *trace.experts.shape[1:])
    half = workload.num_experts // 2
    found = statistics(trace)
    return {
        "reuse_ratio": found.reuse_ratio,
        "gini": found.gini,
        "next_layer_recall_ratio": found.next_layer_recall_ratio,
        "lru_hit_ratio": lru_hit_ratio(experts, workload.num_experts)[half],
        "oracle_hit_ratio": oracle_hit_ratio(experts, workload.num_experts, (half,))[0],
    }


def _without_locality(workload: Workload) -> Workload:
    memory = {name: 0.0 for name in workload.parameters if name.endswith("_share")}
    return dataclasses.replace(workload, parameters={**workload.parameters, **memory})


if __name__ == "__main__":
    sys.exit(main())
