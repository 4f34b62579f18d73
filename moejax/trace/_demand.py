"""From lists of experts to demand: who needs which expert, and when it is needed next."""

import numpy as np
from jaxtyping import Int32, UInt, UInt8

from moejax.errors import UsageError

_BLOCK_CELLS = 2**21


def demand_counts(
    experts: UInt[np.ndarray, "steps layers places_topk"], num_experts: int
) -> UInt8[np.ndarray, "steps layers experts"]:
    """How many tokens of a step demand each expert.

    Args:
      experts: Experts of the tokens of each step, as `batch_trace` returns them.
      num_experts: Experts of one layer; numbers from here on mean "no expert".

    Raises:
      UsageError: More than 255 tokens of a step demand one expert.
    """
    steps, layers, _ = experts.shape
    counts = np.empty((steps, layers, num_experts), np.uint8)
    rows = max(1, _BLOCK_CELLS // (layers * (num_experts + 1)))
    for start in range(0, steps, rows):
        block = experts[start : start + rows]
        num_lists = block.shape[0] * layers
        # One cell more a list collects "no expert".
        cell = known_ids(block, num_experts).reshape(num_lists, -1).astype(np.int64)
        cell += np.arange(num_lists)[:, None] * (num_experts + 1)
        tally = np.bincount(cell.ravel(), minlength=num_lists * (num_experts + 1))
        tally = tally.reshape(block.shape[0], layers, num_experts + 1)[..., :num_experts]
        if tally.max(initial=0) > np.iinfo(np.uint8).max:
            raise UsageError(
                f"{tally.max()} tokens of one step demand the same expert",
                "Counts go up to 255: use a smaller batch.",
            )
        counts[start : start + rows] = tally
    return counts


def known_ids(experts: UInt[np.ndarray, "*axes"], num_experts: int) -> UInt[np.ndarray, "*axes"]:
    """The same ids, but `num_experts` for all that name no expert.

    Where all numbers of the type name experts, as 8 bits do of 256, none is left for that.
    """
    return np.minimum(experts, min(num_experts, np.iinfo(experts.dtype).max))


def next_use(
    demand: UInt8[np.ndarray, "steps layers experts"],
) -> Int32[np.ndarray, "steps layers experts"]:
    """The step at which each expert is demanded next, strictly after the present one.

    Args:
      demand: Counts of `demand_counts`.

    Returns:
      Numbers of steps; the number of steps itself where an expert is never demanded again.
    """
    steps = demand.shape[0]
    following = np.full(demand.shape, steps, np.int32)
    for step in range(steps - 2, -1, -1):
        following[step] = np.where(demand[step + 1], step + 1, following[step + 1])
    return following
