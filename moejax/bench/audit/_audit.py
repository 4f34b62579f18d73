"""The audit: every claim of the study beside what its own experiment gives here."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.bench._grid import GridSettings, Progress
from moejax.bench._requests import learn, open_requests
from moejax.cards import Hardware, ModelSpec, load_hardware, load_model
from moejax.claims import Claim, contradictions, list_claims, load_claims
from moejax.results import to_plain

from ._caches import cache_quantities
from ._choices import choice_quantities
from ._facts import facts_without, machine_facts, study_facts
from ._quantity import TOLERANCE_RATIO, Quantity, judge
from ._study import (
    STUDY_HARDWARE,
    STUDY_MODEL,
    STUDY_WORKLOAD,
    StudySlots,
    by_run,
    run_study,
    slots_of_study,
    study_settings,
)
from ._times import time_quantities
from ._view import CONFIDENCE_PERCENT, Found, View, cells_by_key, find
from ._words import word_quantities


def run_audit(
    results: Mapping[str, Any],
    model: ModelSpec,
    hardware: Hardware,
    *,
    num_runs: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Does the study's experiment again and sets every claim beside it.

    Args:
      results: The run so far, for what the claims come to on its own model.
      model: Card of the run's model.
      hardware: Profile of the run.
      num_runs: Draws of requests in the study's geometry.
      seed: Seed of the draws.
      progress: Told after each strategy.

    Returns:
      `study` (settings, facts and grid) and `audit` (a row a claim), for `results.json`.
    """
    claims = load_claims()
    study_model, study_hardware = load_model(STUDY_MODEL), load_hardware(STUDY_HARDWARE)
    requests = open_requests(None, STUDY_WORKLOAD, study_model, seed)
    profile = learn(requests)
    slots = slots_of_study(claims, study_model)
    settings = study_settings(slots, study_model, num_runs=num_runs, seed=seed)
    grid = run_study(
        settings, slots, study_model, study_hardware, requests, profile, progress=progress
    )
    facts = study_facts(claims, study_model, study_hardware, requests, profile, seed)
    study = {
        "settings": describe_study(settings, slots),
        "facts": facts,
        "grid": grid,
    }
    real = real_view(results, machine_facts(model, hardware))
    return {
        "study": to_plain(study),
        "audit": to_plain(audit_rows(claims, study_views(grid, slots, facts), real)),
    }


def describe_study(settings: GridSettings, slots: StudySlots) -> dict[str, Any]:
    """What the study's grid was run with, and the rule of its verdicts."""
    return {
        "model": STUDY_MODEL,
        "workload": STUDY_WORKLOAD,
        "hardware": STUDY_HARDWARE,
        **dataclasses.asdict(settings),
        "slots": dataclasses.asdict(slots),
        "tolerance_ratio": TOLERANCE_RATIO,
        "interval_percent": CONFIDENCE_PERCENT,
    }


def study_views(
    grid: Sequence[Mapping[str, Any]], slots: StudySlots, facts: Mapping[str, Any]
) -> dict[str, View]:
    """The study's grid under its own assumptions (`study`), and with each of them lifted."""
    cells = cells_by_key(grid, "/study/grid")

    def view(dispatch: str, num_slots: int, lifted: str = "") -> View:
        return View(cells, dispatch, num_slots, {**facts, **facts_without(lifted)})

    return {
        "study": view("sequential", slots.stated),
        "lockstep": view("batched", slots.stated),
        "claimed memory": view("batched", slots.in_bytes),
        "named model": view("sequential", slots.stated, "named model"),
        "bfloat16": view("sequential", slots.stated, "bfloat16"),
    }


def real_view(results: Mapping[str, Any], facts: Mapping[str, Any]) -> View:
    """The run's own grid in the form of the study's cells."""
    records = [*results["grid"], *results["baseline"]]
    points: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["strategy"], record["batch_size"], record["dispatch"])
        points.setdefault(key, []).append(record)
    slots = max(record["slots"] for record in records)
    # Its cells have no place of their own: they are made from the grid's records.
    cells = {(*key, slots): ("/grid", by_run(rows)) for key, rows in points.items()}
    return View(cells, records[0]["dispatch"], slots, facts)


def audit_rows(
    claims: Mapping[str, Any], views: Mapping[str, View], real: View
) -> list[dict[str, Any]]:
    """A row a claim, in the order of the claims."""
    quantities = (
        time_quantities() | cache_quantities(claims) | choice_quantities(claims) | word_quantities()
    )
    excluded = contradictions(claims)
    return [
        _row(claim, quantities[claim.path], views, real, excluded.get(claim.path))
        for claim in list_claims(claims)
    ]


def _row(
    claim: Claim,
    quantity: Quantity,
    views: Mapping[str, View],
    real: View,
    contradiction: str | None,
) -> dict[str, Any]:
    ours = otherwise = on_real = None
    if quantity.value is not None:
        ours = find(quantity.value, views["study"])
        if quantity.assumption is not None:
            otherwise = find(quantity.value, views[quantity.assumption.lifted])
        if quantity.has_real:
            on_real = find(quantity.value, real)
    conflicts = dict.fromkeys([*([contradiction] if contradiction else []), *quantity.conflicts])
    interval = None if ours is None else ours.interval
    return {
        "claim": claim.path,
        "claimed": claim.value,
        "unit": quantity.unit,
        "ours": None if ours is None else ours.value,
        "interval": interval,
        "interval_percent": None if interval is None else CONFIDENCE_PERCENT,
        "ours_otherwise": None if otherwise is None else otherwise.value,
        "ours_real": None if on_real is None else on_real.value,
        "verdict": judge(
            quantity, claim.value, ours, otherwise, is_contradicted=contradiction is not None
        ),
        "assumption": None if quantity.assumption is None else quantity.assumption.text,
        "reason": _reason(claim, quantity, ours, otherwise),
        "conflicts": list(conflicts),
        "source": ours.reads[0] if ours is not None and ours.reads else None,
        "sources": [] if ours is None else list(dict.fromkeys(ours.reads)),
    }


def _reason(claim: Claim, quantity: Quantity, ours: Found | None, otherwise: Found | None) -> str:
    def shown(value: float | str | None) -> str:
        return _written(value, quantity.unit)

    values = {
        "claimed": shown(claim.value),
        "ours": shown(None if ours is None else ours.value),
        "otherwise": shown(None if otherwise is None else otherwise.value),
        "times": _times(claim.value, None if ours is None else ours.value),
    }
    return quantity.reason.format(**values)


def _written(value: float | str | None, unit: str) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return value
    number = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if unit in ("x", ""):
        return number + ("\N{MULTIPLICATION SIGN}" if unit else "")
    return f"{number} {unit}"


def _times(claimed: float | str, ours: float | str | None) -> str:
    if isinstance(claimed, str) or not isinstance(ours, float) or not (claimed and ours):
        return "far"
    return f"{max(claimed / ours, ours / claimed):.3g} times"
