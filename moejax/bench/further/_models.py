"""Another model beside the run's own, at equal shares of its experts on the device."""

import dataclasses
from typing import Any

from moejax.bench._grid import GridSettings, Progress, draw_runs
from moejax.bench._requests import learn, open_requests
from moejax.bench.audit import NAMED_MODEL, SWITCH_MODEL
from moejax.cards import Hardware, ModelSpec, load_model
from moejax.strategies import STRATEGIES
from moejax.workloads import WORKLOADS

from ._cells import Wanted, simulate_cells

SHARES_RATIO = (0.25, 0.5, 0.75)
"""Of a layer's experts that have a slot."""

_WARMUP_STEPS = 256
"""A token of Switch has one expert, so a cache of 96 takes long to fill."""


def cells_of_shares(model: ModelSpec, hardware: Hardware, batch_sizes: tuple[int, ...]):
    """The cells of one model."""
    return [
        Wanted(
            hardware,
            size,
            (round(share * model.num_experts),) * model.num_moe_layers,
            {"model": model.name, "share_ratio": share},
        )
        for share in SHARES_RATIO
        for size in batch_sizes
    ]


def run_other_model(
    own: ModelSpec,
    hardware: Hardware,
    settings: GridSettings,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Switch-Base-128, or Qwen1.5-MoE beside a run of Switch itself, on its own workload.

    Returns:
      What it is, and its cells.
    """
    other = load_model(NAMED_MODEL if own.name == SWITCH_MODEL else SWITCH_MODEL)
    workload = next(w.name for w in WORKLOADS.values() if w.targets and w.model == other.name)
    settings = dataclasses.replace(settings, num_warmup_steps=_WARMUP_STEPS)
    requests = open_requests(None, workload, other, settings.seed)
    profile = learn(requests)
    cells = simulate_cells(
        {name: STRATEGIES[name].make(profile) for name in settings.strategies},
        cells_of_shares(other, hardware, settings.batch_sizes),
        other,
        draw_runs(requests, settings),
        settings,
        what=other.name,
        progress=progress,
    )
    return describe(other, workload) | {"num_warmup_steps": _WARMUP_STEPS}, cells


def describe(model: ModelSpec, workload: str | None) -> dict[str, Any]:
    """The facts of a model that its cells are read with."""
    return {
        "model": model.name,
        "workload": workload,
        "num_moe_layers": model.num_moe_layers,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "expert_bytes": model.expert_bytes,
        "routed_bytes": model.routed_bytes,
    }
