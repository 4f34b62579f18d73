"""What a replay takes in memory, known beforehand, and in how many passes it fits."""

import math
import os

import jax

from moejax.errors import BackendError
from moejax.simulate._blocks import BLOCK_STEPS
from moejax.strategies import CacheShape, Strategy
from moejax.units import format_bytes

# Of the memory there is: the rest is for the trace, for other programs and for what XLA adds.
_SHARE_RATIO = 0.5

# Bytes, rounded up from what XLA says of the programs it compiles; a test compares them.
_CELL_BYTES = 48
_OBJECT_BYTES = 32
_ROW_BYTES = 64
_PAIR_BYTES = 12
_NUM_STATES = 4


def replay_bytes(
    strategy: Strategy,
    shape: CacheShape,
    num_capacities: int,
    *,
    num_lanes: int = 1,
    is_pool: bool = False,
) -> int:
    """About the most memory that `ranks` or `pool` takes, whatever the length of the trace.

    A block of steps counts once. A capacity adds its residents; where the strategy reads the
    cache also a state, and in `ranks` a comparison of all pairs of experts of a layer.

    Args:
      strategy: What scores.
      shape: Sizes of the replay.
      num_capacities: Capacities replayed at once.
      num_lanes: Traces side by side.
      is_pool: Whether one pool serves all layers.
    """
    num_objects = shape.num_layers * shape.num_experts
    # Sets are bits where nobody but the select reads them.
    is_packed = not (is_pool or strategy.reads_cache)
    each = shape.num_layers * _ROW_BYTES + num_objects * (1 if is_packed else _OBJECT_BYTES)
    if strategy.reads_cache:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: strategy.init(shape)))
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        num_rows = shape.num_experts if is_pool else num_objects
        each += _NUM_STATES * state_bytes + _PAIR_BYTES * num_rows * shape.num_experts
    block = _CELL_BYTES * BLOCK_STEPS * num_objects
    return num_lanes * (block + num_capacities * each)


def num_passes(
    strategy: Strategy,
    shape: CacheShape,
    num_capacities: int,
    *,
    num_lanes: int = 1,
    is_pool: bool = False,
    num_devices: int = 1,
) -> int:
    """How often the trace is replayed, so that the capacities of each pass fit in memory.

    The first arguments are those of `replay_bytes`; `num_devices` share the lanes.

    Raises:
      BackendError: Not even one capacity fits.
    """
    sizes = [
        replay_bytes(strategy, shape, number, num_lanes=num_lanes, is_pool=is_pool)
        for number in (0, 1)
    ]
    limit = int(_SHARE_RATIO * free_bytes(num_devices))
    most = (limit - sizes[0]) // (sizes[1] - sizes[0])
    if most < 1:
        raise BackendError(
            f"{num_lanes} trace(s) of {shape.num_layers} layers x {shape.num_experts} experts take "
            f"{format_bytes(sizes[1])} at one capacity, and there are {format_bytes(limit)}",
            "Replay fewer traces side by side, or use a machine with more memory.",
        )
    return max(1, math.ceil(num_capacities / most))


def free_bytes(num_devices: int = 1) -> int:
    """Memory of the first devices of this process that is not taken, or of the host, all of it."""
    stats = [device.memory_stats() for device in jax.local_devices()[:num_devices]]
    known = [one for one in stats if one and "bytes_limit" in one]
    if known:
        return sum(one["bytes_limit"] - one["bytes_in_use"] for one in known)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
