"""Rung 1: exact hits and loads for every capacity at once, without a clock.

Time goes by in blocks, so memory does not depend on the length of the trace. Prefetch has no
meaning without a clock: here every strategy fetches on demand alone, and `timeline` adds the rest.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from moejax.devices import local_mesh
from moejax.errors import UsageError
from moejax.simulate._blocks import BLOCK_STEPS, Stream, block_at
from moejax.simulate._memory import num_passes
from moejax.simulate._mesh import AXIS, placed
from moejax.simulate._rank_blocks import Kind, per_capacity, shared
from moejax.simulate._replay import MAX_DEPTH, Replay
from moejax.simulate._select import Tally, no_tally
from moejax.strategies import CacheShape, Strategy

# Device counts have 32 bits, and work that is queued holds memory.
_DRAIN_BLOCKS = 16
# Capacities that lie side by side in memory: a vector's worth, so that no odd ones are left over.
_VECTOR = 16


class Counts(NamedTuple):
    """Exact counts of a demand-only replay; lanes are those of the `Stream`.

    Attributes:
      num_hits: Demands met by a resident expert.
      num_forgiven: First touches while a slot was free, which the published curves count as hits.
      num_decode_hits: `num_hits` of the steps marked as decode.
      num_demands: Distinct experts demanded.
      num_decode_demands: The same in the steps marked as decode.
    """

    num_hits: Int[np.ndarray, "*lanes layers capacities"]
    num_forgiven: Int[np.ndarray, "*lanes layers capacities"]
    num_decode_hits: Int[np.ndarray, "*lanes layers capacities"]
    num_demands: Int[np.ndarray, "*lanes layers"]
    num_decode_demands: Int[np.ndarray, "*lanes layers"]

    @property
    def hit_ratio(self) -> Float[np.ndarray, "*lanes capacities"]:
        """Hits over demands: every load is a miss."""
        return self.num_hits.sum(-2) / np.maximum(1, self.num_demands.sum(-1))[..., None]

    @property
    def hit_ratio_warm(self) -> Float[np.ndarray, "*lanes capacities"]:
        """The same by the convention of the published curves: cold misses are forgiven."""
        num_met = (self.num_hits + self.num_forgiven).sum(-2)
        return num_met / np.maximum(1, self.num_demands.sum(-1))[..., None]


class Marks(NamedTuple):
    """What is known of each step besides its demand.

    Attributes:
      is_decode: Steps counted in `num_decode_hits`.
      is_reset: Steps before which the cache and the strategy start afresh.
    """

    is_decode: Bool[np.ndarray, " steps"]
    is_reset: Bool[np.ndarray, " steps"]


def ranks(
    strategy: Strategy,
    replay: Replay | Stream,
    capacities: Int[np.ndarray, "*layers capacities"],
    key: Key[Array, "*lanes"] | UInt32[Array, "*lanes 2"],
    *,
    topk: int,
    marks: Marks | None = None,
    num_devices: int = 1,
) -> Counts:
    """Replays routing for every capacity at once.

    Where not all capacities fit in memory (`replay_bytes`), the trace is replayed for some of
    them at a time.

    Args:
      strategy: What scores.
      replay: Demand step by step; of a `Stream`, a block of steps at a time is held, and lanes
        are replayed side by side.
      capacities: Slots of a layer: one row for all layers, or a row a layer.
      key: Consumed by the strategy, split by event; one a lane.
      topk: Experts one token demands.
      marks: Decode steps and resets of all lanes; all decode and none by default.
      num_devices: Devices of this process that share the lanes, an equal number each, or the
        capacities of a trace without lanes. No count depends on it.

    Returns:
      The counts.

    Raises:
      UsageError: There are not so many devices, or the lanes are no multiple of them.
      BackendError: Not even one capacity fits in memory.
    """
    if num_devices > 1:
        return _ranks_on_devices(strategy, replay, capacities, key, topk, marks, num_devices)
    return _ranks(strategy, replay, capacities, key, topk, marks, None)


def _ranks_on_devices(
    strategy: Strategy, replay, capacities, key, topk: int, marks, num_devices: int
) -> Counts:
    mesh = local_mesh(num_devices, AXIS)
    if not isinstance(replay, Stream):
        raise UsageError(
            f"{num_devices} devices share streams, not tables of demand", "Use `stream`."
        )
    if replay.experts.ndim == 4:
        num_lanes = replay.experts.shape[1]
        if num_lanes % num_devices:
            raise UsageError(
                f"{num_lanes} lanes are no multiple of {num_devices} devices",
                "Repeat some, or use a number of devices that divides them.",
            )
        return _ranks(strategy, replay, capacities, key, topk, marks, mesh)
    # Every device sees the whole trace, and a share of the capacities.
    num_capacities = np.shape(capacities)[-1]
    rows = np.broadcast_to(capacities, (replay.experts.shape[1], num_capacities))
    rows = np.pad(rows, ((0, 0), (0, -num_capacities % num_devices)), mode="edge")
    shares = np.stack(np.split(rows, num_devices, axis=1))
    lanes = Stream(
        _repeated(replay.experts, num_devices),
        replay.num_experts,
        None if replay.coming is None else _repeated(replay.coming, num_devices),
    )
    keys = jnp.broadcast_to(key[None], (num_devices, *key.shape))
    found = _ranks(strategy, lanes, shares, keys, topk, marks, mesh)
    *cells, num_demands, num_decode_demands = side_by_side(
        [Counts(*share) for share in zip(*found, strict=True)]
    )
    hits, forgiven, decode_hits = (cell[:, :num_capacities] for cell in cells)
    return Counts(hits, forgiven, decode_hits, num_demands, num_decode_demands)


def _repeated(table: np.ndarray, number: int) -> np.ndarray:
    """The same table in every lane, without a copy."""
    return np.broadcast_to(table[:, None], (len(table), number, *table.shape[1:]))


def _ranks(
    strategy: Strategy,
    replay: Replay | Stream,
    capacities,
    key,
    topk: int,
    marks: Marks | None,
    mesh: Mesh | None,
) -> Counts:
    table = replay.experts if isinstance(replay, Stream) else replay.demand
    num_steps, *lanes, num_layers, num_experts = table.shape
    if isinstance(replay, Stream):
        num_experts = replay.num_experts
    if marks is None:
        marks = Marks(np.ones(num_steps, bool), np.zeros(num_steps, bool))
    shape = CacheShape(num_layers, num_experts, topk, min(MAX_DEPTH, num_layers - 1))
    kind = Kind(strategy, shape, isinstance(replay, Stream), bool(marks.is_reset.any()), mesh)
    num_capacities = np.shape(capacities)[-1]
    num_parts = num_passes(
        strategy,
        shape,
        num_capacities,
        num_lanes=math.prod(lanes),
        num_devices=1 if mesh is None else mesh.size,
    )
    if num_parts > 1:
        parts = np.array_split(capacities, num_parts, axis=-1)
        return side_by_side(
            [_ranks(strategy, replay, part, key, topk, marks, mesh) for part in parts]
        )
    slots = np.broadcast_to(capacities, (*lanes, num_layers, num_capacities))
    slots = slots.reshape(-1, num_capacities)
    if not strategy.reads_cache and num_capacities > _VECTOR:
        slots = np.pad(slots, ((0, 0), (0, -num_capacities % _VECTOR)))
    slots = jnp.asarray(slots, jnp.int32)
    slots, nothing, key = placed(mesh, (slots, no_tally(slots), key))
    all_decode = bool(marks.is_decode.all())
    run = per_capacity if strategy.reads_cache else shared
    carry: Any = None
    total = None
    tally = waiting = nothing
    for number, start in enumerate(range(0, num_steps, BLOCK_STEPS)):
        block = block_at(
            replay, start, with_future=strategy.reads_future, with_gates=strategy.reads_gates
        )
        here: Any = marks_between(marks, start, start + BLOCK_STEPS)
        if all_decode:
            here = here._replace(is_decode=None)
        carry, tally = run(kind, carry, tally, block, here, slots, key)
        if number % _DRAIN_BLOCKS == _DRAIN_BLOCKS - 1:
            # Waits for the blocks before these, so that the device always has some to do.
            total, waiting, tally = _drained(total, waiting), tally, nothing
    *cells, num_demands, num_decode_demands = _drained(_drained(total, waiting), tally)
    cells = [cell[:, :num_capacities] for cell in cells]
    found = (*cells, num_demands, num_decode_demands)
    return Counts(*(part.reshape(*lanes, num_layers, *part.shape[1:]) for part in found))


def side_by_side(parts: Sequence[Counts]) -> Counts:
    """The counts of all capacities, from those of some capacities each."""
    joined = zip(*(part[:3] for part in parts), strict=True)
    return Counts._make([*(np.concatenate(cell, axis=-1) for cell in joined), *parts[0][3:]])


def marks_between(marks: Marks, start: int, stop: int) -> Marks:
    """The marks of the steps from `start` to `stop`; steps past the end are unmarked."""
    rows = (mark[start:stop] for mark in marks)
    return Marks(*(np.pad(row, (0, stop - start - len(row))) for row in rows))


def _drained(total: list[np.ndarray] | None, tally: Tally) -> list[np.ndarray]:
    found = [np.asarray(part, np.int64) for part in tally]
    return found if total is None else [a + b for a, b in zip(total, found, strict=True)]
