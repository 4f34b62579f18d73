"""Small tuning problems: a made-up geometry on the RTX 3090 profile."""

from dataclasses import replace

import numpy as np

from moejax.cards import ModelSpec, load_hardware, load_model
from moejax.tune import TierProblem, tier_problem

HARDWARE = load_hardware("rtx-3090")
EXPERT_BYTES = 10_000_000


def model(num_layers: int = 6, num_experts: int = 12) -> ModelSpec:
    return replace(
        load_model("tiny-moe"),
        num_layers=num_layers,
        num_moe_layers=num_layers,
        num_experts=num_experts,
        expert_bytes=EXPERT_BYTES,
    )


def concave_curve(num_layers: int = 6, num_experts: int = 12, seed: int = 0) -> np.ndarray:
    """Hit curves like those of LRU, with layers that reuse more and layers that reuse less."""
    power = np.random.default_rng(seed).uniform(0.4, 1.0, (num_layers, 1))
    return (np.arange(num_experts + 1) / num_experts) ** power


def ragged_curve(num_layers: int, num_experts: int, seed: int) -> np.ndarray:
    """Rising hit curves of any shape: cliffs, plateaus, concave and convex stretches."""
    jumps = np.random.default_rng(seed).exponential(size=(num_layers, num_experts)) ** 3
    curve = np.concatenate([np.zeros((num_layers, 1)), np.cumsum(jumps, axis=1)], axis=1)
    return curve / curve[:, -1:]


def problem(
    curve: np.ndarray | None = None, *, num_slots: float, num_demands: float = 2.0, **options
) -> TierProblem:
    """A problem whose budgets are given in experts rather than bytes."""
    curve = concave_curve() if curve is None else curve
    for tier in ("pinned", "host"):
        if f"num_{tier}" in options:
            options[f"{tier}_budget_bytes"] = int(options.pop(f"num_{tier}") * EXPERT_BYTES)
    return tier_problem(
        HARDWARE,
        model(len(curve), curve.shape[1] - 1),
        curve,
        np.full(len(curve), num_demands),
        budget_bytes=int(num_slots * EXPERT_BYTES),
        **options,
    )
