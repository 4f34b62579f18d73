"""What an offloaded model keeps on the device besides its dense weights: slots and their tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt

from moejax.devices import ONE_DEVICE, Team
from moejax.errors import UsageError
from moejax.offload import ExpertLayout, SlotPlan
from moejax.qwen_moe import KVCache
from moejax.strategies import NEVER, CacheShape, Strategy
from moejax.trace import demand_counts, next_use

from ._event import NUM_COUNTS, ReplayTable, Sizes, Tables
from ._programs import Place
from .kernels._copy import NUM_FIELDS, Schedule
from .kernels._parts import next_power_of_2

_LEAST_PADDED = 16
# What one program of a kernel can read of a layer's state while the layer computes. Tables of
# pairs of experts grow with the depth of a prefetch: 16 KiB a layer ahead, of 60 experts.
_MOST_STATE_BYTES = 56 * 2**10


class ExpertCache(NamedTuple):
    """Experts on the device, and where they are.

    Attributes:
      slots: One packed expert each, see `ExpertLayout`.
      tables: The directory.
    """

    slots: Float[Array, "slots rows hidden"]
    tables: Tables


class OffloadState(NamedTuple):
    """Everything a step changes.

    Attributes:
      kv: Keys and values of what was read so far.
      place: Where every request stands.
      experts: Experts on the device.
    """

    kv: KVCache
    place: Place
    experts: ExpertCache


def make_sizes(
    shape: CacheShape,
    layout: ExpertLayout,
    scope: str,
    strategy: Strategy,
    schedule: Schedule,
    num_devices: int = 1,
) -> Sizes:
    """What programs are compiled for.

    Args:
      shape: Layers, experts of all devices and experts of a token; its depth is replaced by the
        strategy's reach.
      layout: One packed layer.
      scope: `layer` or `pool`.
      strategy: What scores.
      schedule: When rows of a prefetched expert are copied.
      num_devices: Devices that the experts are dealt out among.
    """
    num_choices = shape.num_experts
    shape = shape._replace(num_experts=-(-num_choices // num_devices))
    reach = min(strategy.reach, shape.num_layers - 1)
    # A pool is never prefetched into, and a kernel wants a power of two.
    prefetches = strategy.prefetches and scope == "layer" and reach > 0
    depth = 1 << (reach.bit_length() - 1) if prefetches else 1
    while depth > 1 and _state_bytes(strategy, shape._replace(depth=depth)) > _MOST_STATE_BYTES:
        depth //= 2
    return Sizes(
        shape=shape._replace(depth=depth),
        num_padded=with_padding(shape.num_experts),
        num_choices=num_choices,
        num_devices=num_devices,
        scope=scope,
        num_rows=layout.num_rows,
        lookahead_width=min(2 * shape.topk, num_choices),
        schedule=schedule if prefetches else None,
        asks_gates=prefetches and strategy.reads_gates,
        reads_future=strategy.reads_future,
    )


def empty_cache(
    sizes: Sizes,
    layout: ExpertLayout,
    plan: SlotPlan,
    strategies: Sequence[Strategy],
    dtype: DTypeLike,
    *,
    num_allocated: int | None = None,
    team: Team = ONE_DEVICE,
) -> ExpertCache:
    """Slots that hold nothing, and strategies that have seen nothing.

    Args:
      sizes: What programs are compiled for.
      layout: One packed layer.
      plan: How many slots of a device are in use.
      strategies: What scores, one for each device.
      dtype: Type of the weights.
      num_allocated: How many slots of a device there are; no more than are in use by default.
      team: The devices.
    """
    # A step always reads a slot, even if it has no use for what lies there.
    num_allocated = max(1, num_allocated or plan.num_slots)
    tables = [
        _empty_tables(sizes, plan, strategy, num_allocated, device)
        for device, strategy in enumerate(strategies)
    ]
    joined = tables[0]
    if len(tables) > 1:
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *tables)
    shape = (team.num_devices * num_allocated, layout.num_rows, layout.hidden)
    return ExpertCache(
        jnp.zeros(shape, dtype, device=team.sharding(Team.OWN)), team.place(joined, Team.OWN)
    )


def _empty_tables(
    sizes: Sizes, plan: SlotPlan, strategy: Strategy, num_allocated: int, device: int
) -> Tables:
    layers, padded = sizes.shape.num_layers, sizes.num_padded
    # A kernel that looks at all layers at once wants a power of two.
    table = (next_power_of_2(layers), padded)
    if plan.scope == "layer":
        num_slots = np.array(plan.slots, np.int32)
        first_slot = np.concatenate([[0], np.cumsum(num_slots)[:-1]]).astype(np.int32)
        is_taken = np.zeros(1, np.int32)
    else:
        num_slots = np.full(layers, plan.num_slots, np.int32)
        first_slot = np.zeros(layers, np.int32)
        is_taken = np.arange(next_power_of_2(num_allocated)) >= plan.num_slots
    return Tables(
        slot_of=jnp.full(table, -1, jnp.int32),
        score=jnp.full(table, -jnp.inf, jnp.float32),
        demand=jnp.zeros((2 * layers, padded), jnp.int32),
        resident=jnp.zeros((layers, padded), jnp.int32),
        said=jnp.zeros((layers if sizes.asks_gates else 1, sizes.shape.depth, padded)),
        first_slot=jnp.asarray(first_slot),
        num_slots=jnp.asarray(num_slots),
        is_taken=jnp.asarray(is_taken, jnp.int32),
        job=jnp.zeros(NUM_FIELDS, jnp.int32),
        counts=jnp.zeros((layers, NUM_COUNTS), jnp.int32),
        step=jnp.zeros(1, jnp.int32),
        device=None if sizes.num_devices == 1 else jnp.full(1, device, jnp.int32),
        state=_padded_state(strategy, sizes),
    )


def with_padding(num_experts: int) -> int:
    """Experts of a layer with padding: a power of two, as kernels want it."""
    return max(_LEAST_PADDED, next_power_of_2(num_experts))


def booleans(strategy: Strategy, sizes: Sizes) -> Any:
    """Which leaves of the strategy's state are booleans, kept as int32."""
    state = jax.eval_shape(lambda: strategy.init(sizes.shape))
    return jax.tree.map(lambda leaf: leaf.dtype == jnp.bool_, state)


def make_replay_table(
    sizes: Sizes,
    experts: UInt[np.ndarray, "steps layers places_topk"],
    batch_size: int,
    num_columns: int,
    *,
    lookahead: Shaped[np.ndarray, "steps layers depth experts"] | None = None,
) -> ReplayTable:
    """Recorded routing as the programs read it, the devices' tables one behind another.

    Args:
      sizes: Of the programs.
      experts: What `batch_trace` gives: the experts of place 0, then of place 1, and so on.
      batch_size: Places.
      num_columns: Places with padding.
      lookahead: `Replay.lookahead`, in 255ths.

    Raises:
      UsageError: The routing has other layers or experts than the model.
    """
    steps, layers, width = experts.shape
    shape = sizes.shape
    if layers != shape.num_layers or width % batch_size or width // batch_size > shape.topk:
        raise UsageError(
            f"routing of {layers} layers and {width} experts a step does not fit a model of "
            f"{shape.num_layers} layers, {shape.topk} experts a token and {batch_size} request(s)",
            "Replay a trace of the same model, batched for as many requests.",
        )
    topk = width // batch_size
    ids = experts.reshape(steps, layers, batch_size, topk).transpose(0, 1, 3, 2).astype(np.int32)
    ids = np.where(ids < sizes.num_choices, ids, NEVER)
    ids = np.pad(
        ids,
        ((0, 0), (0, 0), (0, shape.topk - topk), (0, num_columns - batch_size)),
        constant_values=NEVER,
    )
    counts, devices = demand_counts(experts, sizes.num_choices), range(sizes.num_devices)
    own = [counts[..., device :: sizes.num_devices] for device in devices]
    said = None
    if sizes.asks_gates:
        if lookahead is None:
            lookahead = np.zeros((steps, layers, shape.depth, sizes.num_choices), np.uint8)
        heard = [_said(sizes, lookahead[..., device :: sizes.num_devices]) for device in devices]
        said = jnp.asarray(np.concatenate(heard))
    return ReplayTable(
        experts=jnp.asarray(ids),
        demand=jnp.asarray(np.concatenate([_events(sizes, demand, 0) for demand in own])),
        next_use=jnp.asarray(np.concatenate([_next_events(sizes, demand) for demand in own])),
        lookahead=said,
    )


def _next_events(
    sizes: Sizes, demand: UInt[np.ndarray, "steps layers experts"]
) -> Int32[np.ndarray, "events padded"]:
    steps, layers, _ = demand.shape
    coming = next_use(demand)
    events = coming.astype(np.int64) * layers + np.arange(layers)[None, :, None]
    return _events(sizes, np.where(coming < steps, events, NEVER), NEVER)


def _events(
    sizes: Sizes, rows: Shaped[np.ndarray, "steps layers experts"], filling: int
) -> Int32[np.ndarray, "events padded"]:
    """A row for each event, and for as many beyond the last as a prefetch looks ahead."""
    rows = rows.reshape(-1, rows.shape[-1])
    pads = ((0, sizes.shape.depth), (0, sizes.num_padded - rows.shape[-1]))
    return np.pad(rows, pads, constant_values=filling).astype(np.int32)


def _said(
    sizes: Sizes, lookahead: Shaped[np.ndarray, "steps layers depth experts"]
) -> Float32[np.ndarray, "steps layers depth padded"]:
    steps, layers, depth, num_experts = lookahead.shape
    depth = min(sizes.shape.depth, depth)
    said = np.zeros((steps, layers, sizes.shape.depth, sizes.num_padded), np.float32)
    said[:, :, :depth, :num_experts] = lookahead[:, :, :depth] / np.float32(255)
    return said


def _state_bytes(strategy: Strategy, shape: CacheShape) -> int:
    """Bytes of the strategy's state of one layer."""
    state = jax.eval_shape(lambda: strategy.init(shape))
    leaves = jax.tree.leaves(state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // shape.num_layers


def _padded_state(strategy: Strategy, sizes: Sizes) -> Any:
    """The strategy's first state, with room for the experts that pad a layer."""
    experts, padded = sizes.shape.num_experts, sizes.num_padded

    def pad(leaf: Array) -> Array:
        pads = [(0, 0)] + [(0, padded - experts if n == experts else 0) for n in leaf.shape[1:]]
        leaf = jnp.pad(leaf, pads)
        return leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf

    state = strategy.init(sizes.shape)
    if sizes.shape.depth == experts and any(leaf.ndim > 2 for leaf in jax.tree.leaves(state)):
        raise UsageError(
            f"{experts} experts of a layer on a device are as many as layers to look ahead",
            "Use fewer devices, a model of more experts, or a strategy that does not prefetch.",
        )
    return jax.tree.map(pad, state)
