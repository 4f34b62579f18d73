"""One decode step with the experts in host memory, as seven kernels a layer.

Each layer is a chain: queries, keys and values; attention; output projection; router; the shared
expert's first product, while one program chooses experts and slots; its last product and the
routed experts' first, those on the host read from there once, used and written through into their
slots, while one program chooses a prefetch; the routed experts' last product. After the last
layer the strategy takes the step into its memory. A prefetched expert is copied by a few programs
of three of the kernels. Several requests need one more kernel, which adds up their experts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from moejax.qwen_moe import KVCache, Lookahead, QwenMoeConfig, Routing

from ._event import ReplayTable, Tables
from ._expert_cache import ExpertCache, OffloadState
from ._offload_xla import Decoded
from ._share import total
from .kernels._active import Active
from .kernels._attention import Rotation, attention, rotation
from .kernels._copy import Prefetch, copy_part
from .kernels._dense import (
    head,
    output_part,
    qkv_part,
    shared_down_part,
    shared_up_part,
    sum_squares,
    tile_of,
)
from .kernels._dense_weights import DenseLayers, DenseWeights
from .kernels._experts import Answered, experts_down, experts_gate_up_part, tiles_of
from .kernels._parts import Launch, Part, launch
from .kernels._route import Router, issue_part, read_issued, read_routed, remember_step, route_part
from .kernels._router import router_part

_NUM_COLUMNS = 16


class Program(NamedTuple):
    """What the kernels of a step are compiled for.

    Attributes:
      config: Sizes and settings of the model.
      router: Sizes and settings of the routing.
      num_ahead: How many of the next layers' gates are asked.
      is_interpreted: Whether Pallas interprets the kernels, without a GPU.
    """

    config: QwenMoeConfig
    router: Router
    num_ahead: int
    is_interpreted: bool


class _Stream(NamedTuple):
    """What goes from layer to layer."""

    x: Array
    squares: Array | None
    slots: Array
    tables: Tables


def decode_step(
    weights: DenseWeights,
    hosts: tuple[Array, ...],
    program: Program,
    state: OffloadState,
    replay: ReplayTable | None,
    lookahead: Lookahead | None,
) -> Decoded:
    """Reads the newest token of every request.

    Args:
      weights: Everything but the routed experts.
      hosts: Packed experts of each layer, in host memory.
      program: What the kernels are compiled for.
      state: What was read before, and which experts are on the device.
      replay: Routing that overrides the router.
      lookahead: How far the next layers' gates are asked for the record.
    """
    config, (kv, place, cache) = program.config, state
    batch_size = program.router.batch_size
    x = _columns(weights.embedding[place.token_ids].T)
    turns = rotation(place.positions, config.head_dim, config.rope_theta, x.dtype)
    squares = None if batch_size == 1 else sum_squares(x)[None]
    stream = _Stream(x, squares, cache.slots, cache.tables)
    keys, values, routings = list(kv.keys), list(kv.values), []
    num_hosts = 1 + program.router.sizes.shape.depth
    for number in range(config.num_hidden_layers):
        near = tuple(hosts[(number + step) % len(hosts)] for step in range(num_hosts))
        stream, keys[number], values[number], routed = _layer(
            program,
            jnp.asarray([number], jnp.int32),
            weights.layers,
            near if program.router.sizes.schedule else near[:1],
            stream,
            place.positions,
            turns,
            keys[number],
            values[number],
            replay,
        )
        selected, chosen_weights, logits, ahead = routed
        routings.append(
            _routing(program, number, selected, chosen_weights, logits, ahead, lookahead)
        )
    how = _how(program, "head", x.shape[1])
    logits = head(weights, stream.x, config.rms_norm_eps, how, squares=stream.squares)
    how = Launch(4, is_interpreted=program.is_interpreted)
    tables = remember_step(program.router, stream.tables, replay, how)
    tables = tables._replace(step=tables.step + 1)
    kv = KVCache(tuple(keys), tuple(values))
    return Decoded(logits[:, :batch_size].T, kv, ExpertCache(stream.slots, tables), tuple(routings))


@partial(jax.jit, static_argnums=0)
def _layer(
    program: Program,
    layer: Int32[Array, " 1"],
    weights: DenseLayers,
    hosts: tuple[Array, ...],
    stream: _Stream,
    positions: Int32[Array, " batch"],
    turns: Rotation,
    keys: Array,
    values: Array,
    replay: ReplayTable | None,
):
    """One layer; compiled once for all of them, whose number is an operand."""
    router, (x, squares, slots, tables) = program.router, stream
    schedule, eps = router.sizes.schedule, program.config.rms_norm_eps
    is_interpreted, columns = program.is_interpreted, x.shape[1]

    def copies(name: str, is_live: Array | None = None) -> Part | None:
        if schedule is None:
            return None
        prefetch = Prefetch(tables.job, tables.step, hosts)
        num_warps = _how(program, name, columns).num_warps
        return copy_part(prefetch, layer, len(tables.counts), schedule, name, num_warps, is_live)

    def run(name: str, parts: list, slots: Array):
        shared = (slots,) if parts[0] is not None or name == "experts" else ()
        updated, results = launch(name, parts, _how(program, name, columns), shared=shared)
        return updated[0] if updated else slots, results

    slots, results = run(
        "qkv", [copies("qkv"), qkv_part(layer, weights, x, eps, squares=squares)], slots
    )
    how = Launch(4, is_interpreted=is_interpreted)
    attended, keys, values = attention(positions, turns, results[-1][0], keys, values, how=how)
    _, results = run("output", [None, output_part(layer, weights, x, attended)], slots)
    x, *squares = results[-1]
    asked = router_part(
        layer,
        weights,
        x,
        eps,
        squares=squares[0] if squares else None,
        num_ahead=program.num_ahead,
    )
    _, results = run("router", [None, asked], slots)
    logits, normed, *ahead = results[-1]
    slots, results = run(
        "route",
        [
            copies("route"),
            route_part(router, layer, logits, tables, replay),
            shared_up_part(layer, weights, normed),
        ],
        slots,
    )
    *_, routed_results, (shared_hidden,) = results
    tables, routed = read_routed(tables, routed_results)
    active = routed.active
    slots, results = run(
        "experts",
        [
            copies("experts", active.is_live),
            issue_part(router, layer, tables, replay, ahead[0] if ahead else None),
            experts_gate_up_part(active, normed, hosts[0], is_interpreted=is_interpreted),
            shared_down_part(layer, weights, x, logits, shared_hidden),
        ],
        slots,
    )
    *others, (inner,), (y,) = results
    if schedule is not None:
        tables = read_issued(tables, others[-1])
    how = _how(program, "down", columns)
    x, slots, squares = add_experts(
        router.sizes.num_devices, active, y, inner, hosts[0], slots, how
    )
    found = (routed.selected_experts, routed.routing_weights, logits, ahead[0] if ahead else None)
    return _Stream(x, squares, slots, tables), keys, values, found


def add_experts(
    num_devices: int,
    active: Active,
    y: Array,
    inner: Array,
    host: Array,
    slots: Array,
    how: Launch,
) -> Answered:
    """The residual stream `y` with the experts' answers; those of several devices come together."""
    if num_devices == 1:
        return experts_down(active, y, inner, host, slots, how)
    own, slots, _ = experts_down(
        active, jnp.zeros_like(y), inner, host, slots, how, dtype=jnp.float32
    )
    return end_layer(y, total(own, num_devices), slots, inner.dtype)


def end_layer(y: Array, routed: Array, slots: Array, dtype: jnp.dtype) -> Answered:
    """What the next layer reads, of a residual stream and the sum of the experts' answers."""
    x = (y + routed).astype(dtype)
    return Answered(x, slots, None if y.shape[1] == 1 else sum_squares(x)[None])


def _routing(program: Program, number: int, selected, weights, logits, ahead, lookahead) -> Routing:
    """What the kernels found, as the model's own layers say it."""
    config, batch = program.config, program.router.batch_size
    said = None
    if lookahead is not None:
        rows = [
            jax.lax.top_k(ahead[step, : config.num_experts, :batch].T, lookahead.width)[1]
            if number + 1 + step < config.num_hidden_layers
            else jnp.full((batch, lookahead.width), -1, jnp.int32)
            for step in range(lookahead.depth)
        ]
        said = jnp.stack(rows, axis=1)
    return Routing(
        selected_experts=selected[:, :batch].T,
        routing_weights=weights[:, :batch].T,
        router_logits=logits[: config.num_experts, :batch].T,
        lookahead=said,
    )


def _columns(x: Array) -> Array:
    """Activations with a column a request: one, or as many as a tile of the tensor cores has."""
    batch = x.shape[1]
    return x if batch == 1 else jnp.pad(x, ((0, 0), (0, _NUM_COLUMNS - batch)))


def _how(program: Program, name: str, columns: int) -> Launch:
    """Warps and stages of a kernel: those of its largest part."""
    if name in ("experts", "down"):
        tile = tiles_of(name, columns)
    else:
        tile = tile_of({"route": "shared_up"}.get(name, name), columns)
    return Launch(tile.num_warps, tile.num_stages, program.is_interpreted)
