"""Routing and the expert directory inside a kernel: programs that ride along with products.

`route_part` chooses experts and slots while the shared expert's first product runs; `issue_part`
chooses a prefetch while the routed experts' first product runs; `remember` takes a whole step into
the strategy's memory, a program a layer. All of them trace the strategy that the simulators run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from moejax.engine._event import (
    PREFETCHES,
    ReplayTable,
    Sizes,
    Tables,
    demand_row,
    is_link_free,
    issue,
    read_access,
    remember,
    serve,
)
from moejax.engine._expert_cache import with_padding
from moejax.engine._share import everyones_numbers
from moejax.strategies import Strategy

from . import _active
from ._active import Active
from ._parts import Launch, Part, launch, next_power_of_2

_NONE = 2**30
# Above so many products a sum over one-hot rows is slower than a matrix product.
_MOST_SUMMED = 2**14


class Routed(NamedTuple):
    """What `route_part` writes.

    Attributes:
      active: What the routed experts have to do.
      selected_experts: The router's choice, best first; a large number for none.
      routing_weights: What each counts.
    """

    active: Active
    selected_experts: Int32[Array, "topk batch"]
    routing_weights: Float[Array, "topk batch"]


class Router(NamedTuple):
    """Settings of the routing.

    Attributes:
      strategy: What decides which experts stay on the device.
      sizes: What the program is compiled for.
      is_boolean: Which leaves of the strategy's state are booleans.
      batch_size: Requests; the columns beyond are padding.
      is_normalized: Whether a token's weights are scaled to sum to 1.
    """

    strategy: Strategy
    sizes: Sizes
    is_boolean: Any
    batch_size: int
    is_normalized: bool

    @property
    def num_columns(self) -> int:
        """Columns of `Active`, with padding."""
        return next_power_of_2(self.num_active)

    @property
    def num_active(self) -> int:
        """Experts that one event can demand."""
        shape = self.sizes.shape
        return min(self.batch_size * shape.topk, shape.num_experts)


def route_part(
    router: Router,
    layer: Int32[Array, " 1"],
    logits: Float[Array, "rows batch"],
    tables: Tables,
    replay: ReplayTable | None,
) -> Part:
    """One program that chooses experts and the slots that they are read from or written to.

    Args:
      router: Settings.
      layer: Number of the layer among those with experts.
      logits: The router's scores, a row an expert.
      tables: The directory; six of its tables are updated in place.
      replay: Routing that overrides the router.

    Returns:
      A part that gives those tables and then what `Routed` holds: `read_routed` puts names to
      them.
    """
    sizes = router.sizes
    written = tuple(getattr(tables, name) for name in _WRITTEN)
    read, tree = jax.tree.flatten((layer, logits, tables._replace(**_WRITTEN), replay))
    columns, batch = router.num_columns, logits.shape[1]
    topk = sizes.shape.topk

    def body(program, *refs):
        del program
        refs = refs[-len(written) - len(read) - len(outputs) :]
        inputs = jax.tree.unflatten(tree, refs[len(written) : len(written) + len(read)])
        layer_ref, logits_ref, known, replay = inputs
        known = known._replace(**dict(zip(_WRITTEN, refs[: len(written)], strict=True)))
        table, weights, is_live, chosen_ref, chosen_weights = refs[-5:]
        layer = layer_ref[0]
        rows = with_padding(sizes.num_choices)
        pairs = _choose(router, logits_ref[0:rows, :], known, replay, layer)
        demand, by_expert = jnp.zeros(sizes.num_padded, jnp.int32), None
        own = everyones_numbers(sizes, known)[:, None]
        is_real = _is_real(router, (sizes.num_padded, batch))
        for place, (is_chosen, expert, weight) in enumerate(pairs):
            chosen_ref[place, :] = expert
            chosen_weights[place, :] = weight
            if sizes.num_devices > 1:
                is_chosen = (own == expert[None, :]) & is_real
            demand = demand + is_chosen.astype(jnp.int32).sum(1, dtype=jnp.int32)
            share = jnp.where(is_chosen, weight[None, :], 0.0)
            by_expert = share if by_expert is None else by_expert + share
        is_resident = known.slot_of[layer, :] >= 0
        access = read_access(sizes, known, replay, layer, demand, is_resident, None)
        state = _read_state(router, known, layer)
        served = serve(router.strategy, sizes, known, access, state)
        settled = served.settled
        known.resident[layer, :] = is_resident.astype(jnp.int32)
        if served.slot_of is None:
            known.slot_of[layer, :] = settled.slot_of
        else:
            known.slot_of[:, :] = served.slot_of
            known.is_taken[:] = served.is_taken
        known.score[layer, :] = served.score
        known.demand[demand_row(sizes, known, layer), :] = demand
        known.counts[layer, :] = served.counts
        is_live[0] = served.is_live.astype(jnp.int32)
        _write_active(table, weights, demand > 0, served, by_expert, columns)

    outputs = (
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written),
        jax.ShapeDtypeStruct((_active.NUM_ROWS, columns), jnp.int32),
        jax.ShapeDtypeStruct((columns, batch), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((topk, batch), jnp.int32),
        jax.ShapeDtypeStruct((topk, batch), jnp.float32),
    )
    updates = tuple((index, index) for index in range(len(written)))
    return Part(1, body, (*written, *read), outputs, updates)


def read_routed(tables: Tables, results: tuple[Array, ...]) -> tuple[Tables, Routed]:
    """What `route_part` wrote, by name."""
    written = dict(zip(_WRITTEN, results, strict=False))
    table, weights, is_live, selected, selected_weights = results[len(_WRITTEN) :]
    active = Active(table, weights, is_live)
    return tables._replace(**written), Routed(active, selected, selected_weights)


def issue_part(
    router: Router,
    layer: Int32[Array, " 1"],
    tables: Tables,
    replay: ReplayTable | None,
    ahead: Float[Array, "depth experts batch"] | None,
) -> Part | None:
    """One program that chooses a prefetch; None where the strategy prefetches nothing.

    Args:
      router: Settings.
      layer: Number of the layer among those with experts.
      tables: The directory; four of its tables are updated in place.
      replay: Routing that overrides the router.
      ahead: The next layers' router scores of this layer's hidden state, if they are asked.

    Returns:
      A part that gives those tables and the new job: `read_issued` puts names to them.
    """
    sizes = router.sizes
    if sizes.schedule is None:
        return None
    written = tuple(getattr(tables, name) for name in _ISSUED)
    # Other programs read the job meanwhile, so the next one is a new array.
    read, tree = jax.tree.flatten((layer, tables._replace(**_ISSUED), replay, ahead))

    def body(program, *refs):
        del program
        refs = refs[-len(written) - len(read) - len(outputs) :]
        inputs = jax.tree.unflatten(tree, refs[len(written) : len(written) + len(read)])
        layer_ref, known, replay, ahead_ref = inputs
        known = known._replace(**dict(zip(_ISSUED, refs[: len(written)], strict=True)))
        layer = layer_ref[0]
        said = _said(router, known, replay, ahead_ref, layer)
        if said is not None:
            known.said[layer, :, :] = said
        is_free = is_link_free(sizes, known, layer)
        refs[-1][:] = known.job[:]
        known.counts[layer, PREFETCHES] = 0

        # While a copy is under way there is nothing to choose, and this program is soon done.
        @pl.when(is_free)
        def _():
            demand = known.demand[demand_row(sizes, known, layer), :]
            is_resident = known.resident[layer, :] > 0
            access = read_access(sizes, known, replay, layer, demand, is_resident, said)
            state = _read_state(router, known, layer)
            issued = issue(router.strategy, sizes, known, access, state)
            refs[-1][:] = issued.job
            known.slot_of[issued.target, :] = issued.slot_of
            known.score[issued.target, :] = issued.score
            known.counts[layer, PREFETCHES] = issued.choice.is_issued.astype(jnp.int32)

    outputs = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written)
    outputs += (jax.ShapeDtypeStruct(tables.job.shape, jnp.int32),)
    updates = tuple((index, index) for index in range(len(written)))
    return Part(1, body, (*written, *read), outputs, updates)


def read_issued(tables: Tables, results: tuple[Array, ...]) -> Tables:
    """What `issue_part` wrote, by name."""
    *written, job = results
    return tables._replace(**dict(zip(_ISSUED, written, strict=True)), job=job)


def remember_step(
    router: Router, tables: Tables, replay: ReplayTable | None, how: Launch
) -> Tables:
    """Takes a step, all of whose events are over, into the strategy's memory: a kernel of its own.

    Args:
      router: Settings.
      tables: The directory; the strategy's state is updated in place.
      replay: Routing that overrides the router.
      how: How the kernel runs.

    Returns:
      The directory with the new state; its step number is still the old one.
    """
    sizes = router.sizes
    leaves, state_tree = jax.tree.flatten(tables.state)
    read, tree = jax.tree.flatten((tables._replace(state=None), replay))

    def body(program, *refs):
        known, replay = jax.tree.unflatten(tree, refs[len(leaves) : len(leaves) + len(read)])
        state_refs = refs[: len(leaves)]
        known = known._replace(state=jax.tree.unflatten(state_tree, state_refs))
        state = _read_state(router, known, program)
        state = remember(router.strategy, sizes, known, replay, program, state)
        for ref, new in zip(state_refs, jax.tree.leaves(state), strict=True):
            ref[program] = new.astype(ref.dtype)

    outputs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    updates = tuple((index, index) for index in range(len(leaves)))
    part = Part(sizes.shape.num_layers, body, (*leaves, *read), outputs, updates)
    _, (new,) = launch("remember", [part], how)
    return tables._replace(state=jax.tree.unflatten(state_tree, new))


_WRITTEN: dict[str, Any] = dict.fromkeys(
    ("slot_of", "score", "demand", "resident", "is_taken", "counts")
)
_ISSUED: dict[str, Any] = dict.fromkeys(("slot_of", "score", "said", "counts"))


def _choose(router: Router, logits, tables: Tables, replay: ReplayTable | None, layer):
    """The chosen experts of each request: best first, which, and what each counts."""
    sizes = router.sizes
    expert = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    is_real = _is_real(router, logits.shape)
    logits = jnp.where(expert < sizes.num_choices, logits, -jnp.inf)
    raised = jnp.exp(logits - logits.max(0)[None, :])
    probability = raised / raised.sum(0)[None, :]
    left, found = probability, []
    for place in range(sizes.shape.topk):
        if replay is None:
            best = left.max(0)
            number = jnp.where(left == best[None, :], expert, _NONE).min(0)
        else:
            step = tables.step[0] % replay.experts.shape[0]
            number = replay.experts[step, layer, place, :]
        is_chosen = (expert == number[None, :]) & is_real
        left = jnp.where(is_chosen, -1.0, left)
        found.append((is_chosen, number, jnp.where(is_chosen, probability, 0.0).sum(0)))
    if not router.is_normalized:
        return found
    total = sum(weight for _, _, weight in found)
    total = jnp.where(total > 0, total, 1.0)
    return [(is_chosen, number, weight / total) for is_chosen, number, weight in found]


def _is_real(router: Router, shape: tuple[int, int]):
    """Columns that belong to a request; the others are padding."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) < router.batch_size


def _write_active(table, weights, is_demanded, served, by_expert, columns: int) -> None:
    settled = served.settled
    size = is_demanded.shape[0]
    ones = is_demanded.astype(jnp.int32)
    turn = jnp.cumsum(ones) - ones
    column = jax.lax.broadcasted_iota(jnp.int32, (columns, size), 0)
    goes = (turn[None, :] == column) & is_demanded[None, :]
    number = jax.lax.iota(jnp.int32, size)
    is_partner_of = settled.partner[:, None] == number[None, :]
    partner = jnp.where(is_partner_of, turn[None, :] + 1, 0).sum(1, dtype=jnp.int32)

    def gather(entries):
        return jnp.where(goes, entries[None, :], 0).sum(1, dtype=jnp.int32)

    table[_active.EXPERT, :] = gather(number)
    table[_active.SLOT, :] = gather(settled.read_slot)
    table[_active.LANDED, :] = gather(served.landed_rows)
    table[_active.WRITE, :] = gather(settled.is_written.astype(jnp.int32))
    table[_active.PARTNER, :] = gather(partner) - 1
    table[_active.SKIP, :] = gather(settled.is_partner.astype(jnp.int32))
    table[_active.ACTIVE, :] = gather(ones)
    batch = by_expert.shape[1]
    if columns * size * batch <= _MOST_SUMMED or columns < 16 or batch < 16:
        picked = jnp.where(goes[:, :, None], by_expert[None, :, :], 0.0).sum(1)
    else:
        picked = jax.lax.dot(
            goes.astype(jnp.float32), by_expert, precision=jax.lax.Precision.HIGHEST
        )
    weights[:, :] = picked


def _said(router: Router, tables: Tables, replay: ReplayTable | None, ahead, layer):
    """How high the next gates rank each expert, as `Replay.lookahead`; None if nobody asks."""
    sizes = router.sizes
    if not sizes.asks_gates:
        return None
    depth, width = sizes.shape.depth, sizes.lookahead_width
    if replay is not None:
        assert replay.lookahead is not None
        return replay.lookahead[tables.step[0] % replay.lookahead.shape[0], layer, :, :]
    row = jax.lax.broadcasted_iota(jnp.int32, (depth, sizes.num_padded), 0)
    said = jnp.zeros((depth, sizes.num_padded), jnp.float32)
    for step in range(depth):
        heard = _own(sizes, tables, _ranked(router, ahead[step, :, :], width))
        heard = jnp.where(layer + 1 + step < sizes.shape.num_layers, heard, 0.0)
        said = jnp.where(row == step, heard[None, :], said)
    return said


def _ranked(router: Router, logits, width: int):
    """What the rank of each expert is worth, the best of all requests."""
    shape, num_experts = logits.shape, router.sizes.num_choices
    expert = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    left = jnp.where(expert < num_experts, logits, -jnp.inf)
    if shape[1] == 1:
        mine, number = left[:, 0], jax.lax.iota(jnp.int32, shape[0])
        is_better = (mine[None, :] > mine[:, None]) | (
            (mine[None, :] == mine[:, None]) & (number[None, :] < number[:, None])
        )
        rank = is_better.astype(jnp.int32).sum(1, dtype=jnp.int32)
        steps = 255 - jax.lax.div(255 * rank, jnp.full_like(rank, width))
        return jnp.where(rank < width, steps.astype(jnp.float32) / 255, 0.0)
    is_real = _is_real(router, shape)
    worth = jnp.zeros(shape, jnp.float32)
    for rank in range(width):
        best = left.max(0)
        number = jnp.where(left == best[None, :], expert, _NONE).min(0)
        is_named = expert == number[None, :]
        left = jnp.where(is_named, -jnp.inf, left)
        worth = jnp.where(is_named & is_real, (255 - 255 * rank // width) / 255, worth)
    return worth.max(1)


def _own(sizes: Sizes, tables: Tables, worth):
    """Of what all experts are worth, this device's experts' part."""
    if sizes.num_devices == 1:
        return worth
    everyone = jax.lax.iota(jnp.int32, worth.shape[0])
    is_own = everyones_numbers(sizes, tables)[:, None] == everyone[None, :]
    return jnp.where(is_own, worth[None, :], 0.0).sum(1)


def _read_state(router: Router, tables: Tables, layer) -> Any:
    return jax.tree.map(
        lambda ref, is_boolean: ref[layer] != 0 if is_boolean else ref[layer],
        tables.state,
        router.is_boolean,
    )
