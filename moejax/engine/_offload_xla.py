"""One decode step with the experts in host memory, in plain JAX: for any backend.

The step is one program: a missed expert is sliced out of its host array and put on the device
inside it. Kernels do the same faster on a GPU; see `_offload_kernels`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.offload import unpack
from moejax.qwen_moe import KVCache, Lookahead, QwenMoe, Routing
from moejax.qwen_moe.modeling import DecoderLayer, SparseMoeBlock
from moejax.strategies import Strategy

from ._directory import Settled
from ._event import (
    PREFETCHES,
    Issued,
    ReplayTable,
    Served,
    Sizes,
    Tables,
    demand_row,
    issue,
    read_access,
    remember,
    serve,
)
from ._expert_cache import ExpertCache, OffloadState, booleans
from ._share import own_numbers, total

# So many experts are spelled out one after another; more go round a loop.
_MOST_UNROLLED = 8


class Decoded(NamedTuple):
    """What one step found out, before a token is chosen.

    Attributes:
      logits: Scores of the next token.
      kv: Keys and values with the new token in them.
      experts: Experts on the device.
      routings: Routing of every layer that has experts.
    """

    logits: Float[Array, "batch vocab"]
    kv: KVCache
    experts: ExpertCache
    routings: tuple[Routing, ...]


def decode_step(
    model: QwenMoe,
    hosts: tuple[Array, ...],
    strategy: Strategy,
    sizes: Sizes,
    state: OffloadState,
    replay: ReplayTable | None,
    lookahead: Lookahead | None,
) -> Decoded:
    """Reads the newest token of every request.

    Args:
      model: Everything but the routed experts, whose parameters hold nothing.
      hosts: Packed experts of each layer that has them, in host memory; those of this device.
      strategy: What decides which experts stay on the device.
      sizes: What the program is compiled for.
      state: What was read before, and which experts are on the device.
      replay: Routing that overrides the router.
      lookahead: How far the next layers' gates are asked for the record.
    """
    positions = state.place.positions[:, None]
    x = model.embed_tokens(state.place.token_ids[:, None])
    cache, routings = state.experts, []
    keys, values = list(state.kv.keys), list(state.kv.values)
    for number, layer in enumerate(model.layers):
        x, (keys[number], values[number]) = layer.attend(
            x, positions, (keys[number], values[number])
        )
        if not isinstance(layer.mlp, SparseMoeBlock):
            x, _ = layer.feed_forward(x)
            continue
        stream = x
        x, routing, cache = _feed_forward(
            model, number, hosts, strategy, sizes, cache, x, replay, len(routings)
        )
        if lookahead is not None:
            routing = routing._replace(lookahead=model.foresee(stream, number, lookahead))
        routings.append(routing)
    tables = _remember(cache.tables, strategy, sizes, replay)
    logits = model.logits(model.norm(x)[:, 0])
    kv = KVCache(tuple(keys), tuple(values))
    return Decoded(logits, kv, cache._replace(tables=tables), tuple(routings))


def _feed_forward(
    model, number, hosts, strategy, sizes, cache, x, replay, moe_layer
) -> tuple[Array, Routing, ExpertCache]:
    """The experts of one layer, those on the host fetched as they are needed."""
    layer, tables = model.layers[number], cache.tables
    flat = layer.post_attention_layernorm(x).reshape(-1, x.shape[-1])
    index = jnp.int32(moe_layer)
    routing = _route(layer, flat, tables, replay, moe_layer)
    own = own_numbers(sizes, tables, routing.selected_experts)
    chosen = jax.nn.one_hot(own, sizes.num_padded, dtype=jnp.int32)
    weights = (chosen * routing.routing_weights[..., None]).sum(1)
    said = None
    if sizes.asks_gates:
        said = _said(model, number, x, sizes, tables, replay, moe_layer)
    demand = chosen.sum((0, 1), dtype=jnp.int32)
    resident = tables.slot_of[index] >= 0
    access = read_access(sizes, tables, replay, index, demand, resident, said)
    mine = jax.tree.map(lambda leaf: leaf[index], _read_state(tables, strategy, sizes))
    served = serve(strategy, sizes, tables, access, mine)
    num_active = min(own.size, sizes.shape.num_experts)
    routed, slots = _compute(
        flat, weights, hosts[moe_layer], cache.slots, demand > 0, served.settled, num_active
    )
    row = demand_row(sizes, tables, index)
    tables = tables._replace(
        demand=tables.demand.at[row].set(demand),
        resident=tables.resident.at[index].set(resident.astype(jnp.int32)),
    )
    if said is not None:
        tables = tables._replace(said=tables.said.at[index].set(said))
    tables = _after(tables, served, index)
    if sizes.schedule is not None:
        issued = issue(strategy, sizes, tables, access, mine)
        tables = _issued(tables, issued, index)
        slots = _prefetch(slots, hosts, issued)
    shared = jax.nn.sigmoid(layer.mlp.shared_expert_gate(flat)) * layer.mlp.shared_expert(flat)
    y = total(routed, sizes.num_devices).astype(x.dtype) + shared
    return x + y.reshape(x.shape), routing, ExpertCache(slots, tables)


def _route(
    layer: DecoderLayer,
    flat: Float[Array, "batch hidden"],
    tables: Tables,
    replay: ReplayTable | None,
    moe_layer: int,
) -> Routing:
    """What the router says, or the replayed trace in its place, with the router's weights."""
    assert isinstance(layer.mlp, SparseMoeBlock)
    routing = layer.mlp.route(flat)
    if replay is None:
        return routing
    selected = replay.experts[tables.step[0] % len(replay.experts), moe_layer].T
    config = layer.mlp.config
    probabilities = jax.nn.softmax(routing.router_logits, axis=-1)
    is_known = selected < config.num_experts
    weights = jnp.take_along_axis(probabilities, jnp.where(is_known, selected, 0), axis=-1)
    weights = jnp.where(is_known, weights, 0.0)
    if config.norm_topk_prob:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
    return routing._replace(selected_experts=selected, routing_weights=weights)


def _said(
    model, number, stream, sizes: Sizes, tables: Tables, replay: ReplayTable | None, moe_layer
) -> Float[Array, "depth experts"]:
    """How high the next gates rank each expert, as `Replay.lookahead`."""
    depth, width = sizes.shape.depth, sizes.lookahead_width
    if replay is not None:
        assert replay.lookahead is not None
        return replay.lookahead[tables.step[0] % len(replay.lookahead), moe_layer]
    named = model.foresee(stream, number, Lookahead(depth, width))
    worth = (255 - 255 * jnp.arange(width) // width).astype(jnp.float32) / 255
    own = own_numbers(sizes, tables, named)
    one_hot = jax.nn.one_hot(own, sizes.num_padded, dtype=jnp.float32)
    return (one_hot * worth[None, None, :, None]).max((0, 2))


def _compute(
    x: Float[Array, "batch hidden"],
    weights: Float[Array, "batch experts"],
    host: Float[Array, "experts rows hidden"],
    slots: Float[Array, "slots rows hidden"],
    is_demanded: Bool[Array, " experts"],
    settled: Settled,
    num_active: int,
) -> tuple[Float[Array, "batch hidden"], Float[Array, "slots rows hidden"]]:
    """The demanded experts' answers, and the slots with those that were fetched and stay.

    An expert may be read from a slot that another takes in the same event: hits come first. The
    answers are added in the order of the experts' numbers whatever the cache does.
    """
    numbers = jnp.arange(len(is_demanded))
    ids = jnp.sort(jnp.where(is_demanded, numbers, len(numbers)))[:num_active]
    is_real, ids = ids < len(numbers), jnp.minimum(ids, len(numbers) - 1)
    is_miss = settled.is_miss[ids] & is_real
    order = jnp.argsort(is_miss)

    def one(turn: int | Int[Array, ""], carry):
        slots, answers = carry
        column = order[turn]
        expert, is_fetched = ids[column], is_miss[column]
        slot = settled.read_slot[expert]
        packed = jax.lax.cond(
            is_fetched,
            lambda host, slots: _to_device(_at(host, expert)),
            lambda host, slots: _at(slots, slot),
            host,
            slots,
        )
        is_stored = is_fetched & settled.is_written[expert]
        slots = jax.lax.cond(
            is_stored,
            lambda slots: jax.lax.dynamic_update_index_in_dim(slots, packed, slot, 0),
            lambda slots: slots,
            slots,
        )
        answer = weights[:, expert, None] * _expert(x, packed)
        answers = answers.at[column].set(jnp.where(is_real[column], answer, 0.0))
        return slots, answers

    carry = (slots, jnp.zeros((num_active, *x.shape), jnp.float32))
    if num_active <= _MOST_UNROLLED:
        for turn in range(num_active):
            carry = one(turn, carry)
    else:
        carry = jax.lax.fori_loop(0, num_active, one, carry)
    slots, answers = carry
    return add_up(answers, ids), slots


def add_up(
    answers: Float[Array, "columns batch hidden"], ids: Int[Array, " columns"]
) -> Float[Array, "batch hidden"]:
    """The sum of the experts' answers in the order of their numbers, which rise."""
    del ids
    return answers.sum(0)


def _expert(
    x: Float[Array, "batch hidden"], packed: Float[Array, "rows hidden"]
) -> Float[Array, "batch hidden"]:
    """One expert's answer to every request, accumulated in float32."""
    gate_up, down = unpack(packed[None])
    gate, up = jnp.split(_product(x, gate_up[0]), 2, axis=-1)
    inner = (jax.nn.silu(gate) * up).astype(x.dtype)
    return _product(inner, down[0])


def _product(x: Array, weight: Array) -> Array:
    return jnp.einsum("bi,oi->bo", x, weight, preferred_element_type=jnp.float32)


def _at(array: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _to_device(array: Array) -> Array:
    """Without this XLA would compute with a host array on the host."""
    if jax.default_backend() == "cpu":
        return array
    return jax.device_put(array, jax.memory.Space.Device)


def _after(tables: Tables, served: Served, layer: Array) -> Tables:
    settled = served.settled
    tables = tables._replace(
        score=tables.score.at[layer].set(served.score),
        counts=tables.counts.at[layer].set(served.counts),
    )
    if served.slot_of is None or served.is_taken is None:
        return tables._replace(slot_of=tables.slot_of.at[layer].set(settled.slot_of))
    return tables._replace(slot_of=served.slot_of, is_taken=served.is_taken)


def _issued(tables: Tables, issued: Issued, layer: Array) -> Tables:
    num_issued = issued.choice.is_issued.astype(jnp.int32)
    return tables._replace(
        slot_of=tables.slot_of.at[issued.target].set(issued.slot_of),
        score=tables.score.at[issued.target].set(issued.score),
        job=issued.job,
        counts=tables.counts.at[layer, PREFETCHES].set(num_issued),
    )


def _remember(
    tables: Tables, strategy: Strategy, sizes: Sizes, replay: ReplayTable | None
) -> Tables:
    """The strategy's memory of the step, of all layers at once."""

    def one(layer, state):
        return remember(strategy, sizes, tables, replay, layer, state)

    layers = jnp.arange(sizes.shape.num_layers, dtype=jnp.int32)
    state = jax.vmap(one)(layers, _read_state(tables, strategy, sizes))
    state = jax.tree.map(lambda leaf, new: new.astype(leaf.dtype), tables.state, state)
    return tables._replace(state=state, step=tables.step + 1)


def _read_state(tables: Tables, strategy: Strategy, sizes: Sizes) -> Any:
    return jax.tree.map(
        lambda leaf, is_boolean: leaf != 0 if is_boolean else leaf,
        tables.state,
        booleans(strategy, sizes),
    )


def _prefetch(slots: Array, hosts: tuple[Array, ...], issued: Issued) -> Array:
    """Copies at once what a GPU copies bit by bit under the next layers' compute."""
    choice = issued.choice

    def copy_from(host):
        def copy(slots):
            packed = _to_device(_at(host, choice.expert))
            return jax.lax.dynamic_update_index_in_dim(slots, packed, issued.slot, 0)

        return copy

    branches = [lambda slots: slots, *map(copy_from, hosts)]
    number = jnp.where(choice.is_issued, issued.target + 1, 0)
    return jax.lax.switch(number, branches, slots)
