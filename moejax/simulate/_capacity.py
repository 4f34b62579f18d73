"""Slots that a byte budget buys."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moejax.errors import InfeasibleBudgetError
from moejax.units import format_bytes


def slots_within(
    budget_bytes: int, expert_bytes: Sequence[int] | Int[np.ndarray, " layers"], num_experts: int
) -> tuple[int, ...]:
    """The most even slots per layer whose experts fit a budget.

    Every layer gets the same number; what is left buys one more for the first layers.

    Args:
      budget_bytes: Bytes for all layers together.
      expert_bytes: Bytes of an expert of each layer.
      num_experts: Experts of a layer, beyond which slots are useless.

    Raises:
      InfeasibleBudgetError: Not even one expert fits.
    """
    sizes = [int(size) for size in expert_bytes]
    if budget_bytes < max(sizes):
        raise InfeasibleBudgetError(
            f"{format_bytes(budget_bytes)} holds no expert of {format_bytes(max(sizes))}",
            f"The smallest feasible budget is {max(sizes)}B; raise --budget or --capacity.",
        )
    each = min(budget_bytes // sum(sizes), num_experts)
    slots, left = [each] * len(sizes), budget_bytes - each * sum(sizes)
    for layer, size in enumerate(sizes):
        if slots[layer] < num_experts and size <= left:
            slots[layer] += 1
            left -= size
    return tuple(slots)
