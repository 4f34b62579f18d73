"""One cache shared by the experts of all layers, limited in slots or in bytes."""

import functools

import numpy as np
from jaxtyping import Int

from moejax._types import PRNGKey
from moejax.simulate._blocks import BLOCK_STEPS, Stream, block_at
from moejax.simulate._memory import num_passes
from moejax.simulate._pool_blocks import Limits, serve_block, start_pools
from moejax.simulate._rank_blocks import Kind
from moejax.simulate._ranks import Counts, Marks, marks_between, side_by_side
from moejax.simulate._replay import MAX_DEPTH, Replay
from moejax.strategies import CacheShape, Strategy, check_pool


def pool(
    strategy: Strategy,
    replay: Replay | Stream,
    capacities: Int[np.ndarray, " capacities"],
    key: PRNGKey,
    *,
    topk: int,
    weight: Int[np.ndarray, " layers"] | None = None,
    marks: Marks | None = None,
) -> Counts:
    """Replays routing through one pool for all layers, without a clock.

    After each event the pool keeps the longest prefix of its candidates, best first by the score
    of each layer's last event, that fits. Scores of different layers compete, so only strategies
    whose scores mean the same in every layer do well here.

    For every capacity an event costs O(experts), and an eviction O(layers + experts). Memory holds
    a block of steps and the residents, O(capacities x layers x experts), and does not grow with
    the trace; where not all capacities fit (`replay_bytes`), some are replayed at a time.

    Args:
      strategy: What scores; `Access.capacity` is the pool's, in units of `weight`.
      replay: Demand step by step; of a `Stream`, without lanes, a block of steps at a time is held.
      capacities: What the pool holds, in units of `weight`.
      key: Consumed by the strategy, split by event.
      topk: Experts one token demands.
      weight: Size of an expert of each layer, such as bytes; 1 by default, so slots.
      marks: Decode steps and resets; all decode and none by default.

    Returns:
      The counts.

    Raises:
      UsageError: The strategy orders only the experts of one layer.
      BackendError: Not even one capacity fits in memory.
    """
    check_pool(strategy.keeps_layers_apart)
    is_stream = isinstance(replay, Stream)
    table = replay.experts if is_stream else replay.demand
    num_steps, num_layers, num_experts = table.shape
    num_experts = replay.num_experts if is_stream else num_experts
    if marks is None:
        marks = Marks(np.ones(num_steps, bool), np.zeros(num_steps, bool))
    shape = CacheShape(num_layers, num_experts, topk, min(MAX_DEPTH, num_layers - 1))
    num_parts = num_passes(strategy, shape, len(capacities), is_pool=True)
    if num_parts > 1:
        run = functools.partial(pool, topk=topk, weight=weight, marks=marks)
        parts = np.array_split(capacities, num_parts)
        return side_by_side([run(strategy, replay, part, key) for part in parts])
    weight = np.ones(num_layers) if weight is None else np.asarray(weight)
    limits = _in_32_bits(weight, np.asarray(capacities), num_experts)
    kind = Kind(strategy, shape, is_stream, bool(marks.is_reset.any()))
    pools = start_pools(kind, len(limits.capacity))
    cells = np.zeros((3, num_layers, len(limits.capacity)), np.int64)
    total = waiting = (cells, np.zeros((2, num_layers), np.int64))
    for start in range(0, num_steps, BLOCK_STEPS):
        block = block_at(
            replay, start, with_future=strategy.reads_future, with_gates=strategy.reads_gates
        )
        here = marks_between(marks, start, start + BLOCK_STEPS)
        pools, counts = serve_block(kind, pools, block, here, limits, key)
        # Waits for the block before this one, so that the device always has one to do.
        total, waiting = _drained(total, waiting), counts
    cells, demands = _drained(total, waiting)
    return Counts(*cells, *demands)


def _drained(total: tuple[np.ndarray, ...], counts) -> tuple[np.ndarray, ...]:
    """The sum on the host, in 64 bits."""
    return tuple(old + np.asarray(new, np.int64) for old, new in zip(total, counts, strict=True))


def _in_32_bits(
    weight: Int[np.ndarray, " layers"], capacities: Int[np.ndarray, " capacities"], num_experts: int
) -> Limits:
    """Sizes and capacities in a common unit, small enough that sums fit 32 bits.

    The unit is the greatest common divisor, and the counts exact, unless all experts together
    are more than 2**30 of it; then sizes are rounded up, so that a pool is never overfilled.
    """
    weight = weight.astype(np.int64)
    unit = max(int(np.gcd.reduce(weight)), -(-num_experts * int(weight.sum()) // 2**30))
    limits = np.minimum(capacities // unit, 2**30)
    return Limits((-(-weight // unit)).astype(np.int32), limits.astype(np.int32))
