"""K in {4, 8, 16}: experts that `top_k` pins in a layer, and experts that a token is routed to."""

import dataclasses
from typing import Any

from moejax.bench._grid import GridSettings, Progress, total_steps
from moejax.bench._requests import draw_profile, draw_synthetic
from moejax.bench.audit import BASELINE, STUDY_HARDWARE, STUDY_MODEL, STUDY_WORKLOAD
from moejax.cards import load_hardware, load_model
from moejax.claims import STRATEGIES_OF_STUDY, load_claims
from moejax.strategies import STRATEGIES, learn_profile
from moejax.workloads import WORKLOADS

from ._cells import Wanted, ends, simulate_cells, told

VALUES = (4, 8, 16)
"""Those that the study names."""


def run_top_k(settings: GridSettings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Both readings of the study's "top-K values 4, 8, 16", in its geometry, of its strategies.

    `pins`: the K of its strategy Top-K, which it gives as 32, with caches of K slots a layer.
    `routed`: the experts of a token, of which its model has 8, with 32 slots a layer.
    """
    model, hardware = load_model(STUDY_MODEL), load_hardware(STUDY_HARDWARE)
    workload = WORKLOADS[STUDY_WORKLOAD]
    stated = load_claims()["cache_slots"]["l1"]
    sizes = ends(settings.batch_sizes)
    names = (*STRATEGIES_OF_STUDY, BASELINE)
    settings = dataclasses.replace(settings, batch_sizes=sizes, strategies=names)

    def cells(num_experts_per_tok: int, slots: dict[int, str]) -> list[dict[str, Any]]:
        routed = dataclasses.replace(workload, num_experts_per_tok=num_experts_per_tok)
        card = dataclasses.replace(model, num_experts_per_tok=num_experts_per_tok)
        profile = learn_profile(draw_profile(routed, settings.seed))
        draws = [
            draw_synthetic(
                routed, settings.seed + run, num_places=sizes[-1], num_steps=total_steps(settings)
            )
            for run in range(settings.num_runs)
        ]
        wanted = [
            Wanted(
                hardware,
                size,
                (number,) * model.num_moe_layers,
                {"reading": reading, "num_experts_per_tok": num_experts_per_tok},
            )
            for number, reading in slots.items()
            for size in sizes
        ]
        strategies = {name: STRATEGIES[name].make(profile) for name in names}
        what = f"top-k {num_experts_per_tok}"
        return simulate_cells(
            strategies, wanted, card, draws, settings, what=what, progress=progress
        )

    found = []
    for value in VALUES:
        pins = dict.fromkeys(VALUES, "pins") if value == model.num_experts_per_tok else {}
        found += cells(value, pins | {stated: "routed"})
    heading = {"model": STUDY_MODEL, "workload": STUDY_WORKLOAD, "hardware": STUDY_HARDWARE}
    return {"settings": told(settings) | heading, "cells": found}
