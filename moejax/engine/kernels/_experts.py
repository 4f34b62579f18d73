"""The routed experts' products: from slots, or from host memory and through into a slot.

Where the weights of an expert lie decides only where they are read. Tiles and the order of sums
are the same, so that no bit of the answer depends on what is resident.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from . import _active
from ._active import Active
from ._dense import Tile, sum_squares
from ._parts import Launch, Part, launch, pieces

TILES = {
    "experts": (Tile(2, 2048, 8), Tile(16, 128, 2, 5)),
    "down": (Tile(8, 1024, 8), Tile(32, 128, 4, 4)),
}
"""Cut of each product: for one request and for up to 16, measured on an H100."""

_COMBINED_ROWS = 32


def tiles_of(name: str, batch_pad: int) -> Tile:
    """The cut of a product in `TILES` for so many columns of activations."""
    return TILES[name][batch_pad > 1]


def experts_gate_up_part(
    active: Active,
    normed: Float[Array, "hidden batch"],
    host: Float[Array, "experts rows hidden"],
    *,
    tile: Tile | None = None,
    is_interpreted: bool = False,
) -> Part:
    """Hidden values of the active experts: silu(gate) * up.

    The kernel's shared array is the slots, [slots, 3 * ffn, hidden].

    Args:
      active: What each column has to do.
      normed: Normed residual stream.
      host: Packed experts of this layer, in host memory.
      tile: How to cut the products; None takes `TILES`. Its rows must divide the experts' width.
      is_interpreted: Whether the kernel is interpreted, where programs need no barrier.

    Returns:
      A part with one output, [columns, ffn, batch] in the type of `normed`; what belongs to an
      inactive column is undefined.
    """
    hidden, batch = normed.shape
    num_columns, ffn = active.table.shape[1], host.shape[1] // 3
    tile = tile or tiles_of("experts", batch)
    rows = _rows(tile, ffn)
    num_blocks = ffn // rows

    def body(program, slots_ref, table_ref, x_ref, host_ref, out_ref):
        row = jax.lax.rem(program, num_blocks) * rows

        def compute(column):
            source = _Source.of_column(table_ref, column, slots_ref, host_ref)

            def block(first):
                def at(offset, length):
                    return pl.ds(first, rows), pl.ds(offset, length)

                return _Block(source, at, first + rows <= source.num_landed)

            blocks = [block(row), block(ffn + row)]
            if batch == 1:
                gate, up = _sum_products(blocks, x_ref, tile.columns)
                out_ref[column, pl.ds(row, rows), 0] = _activated(gate, up, out_ref.dtype)
            else:
                gate, up = _multiply(blocks, _at_once(x_ref), hidden, rows, tile.columns)
                out_ref[column, pl.ds(row, rows), :] = _activated(gate, up, out_ref.dtype)

        _take_turns(table_ref, jax.lax.div(program, num_blocks), compute, is_interpreted)

    output = jax.ShapeDtypeStruct((num_columns, ffn, batch), normed.dtype)
    inputs = (active.table, normed, host)
    return Part(num_columns * num_blocks, body, inputs, (output,))


class Answered(NamedTuple):
    """What the routed experts leave behind.

    Attributes:
      x: The new residual stream.
      slots: The slots, with what was written through.
      squares: For several requests, sums over parts of the stream's squares; see `output_part`.
    """

    x: Float[Array, "hidden batch"]
    slots: Float[Array, "slots rows hidden"]
    squares: Float[Array, "parts batch"] | None


def experts_down(
    active: Active,
    y: Float[Array, "hidden batch"],
    inner: Float[Array, "columns ffn batch"],
    host: Float[Array, "experts rows hidden"],
    slots: Float[Array, "slots rows hidden"],
    how: Launch,
    *,
    tile: Tile | None = None,
) -> Answered:
    """Adds the answers of the active experts to the residual stream.

    One kernel for one request; for several a second one adds up the columns in their order.

    Args:
      active: What each column has to do.
      y: Residual stream with the shared expert's answer, in float32.
      inner: Hidden values as `experts_gate_up_part` gives them.
      host: Packed experts of this layer, in host memory.
      slots: Updated in place.
      how: How the kernels run.
      tile: How to cut the product; None takes `TILES`. Its rows must divide the hidden size.
    """
    tile = tile or tiles_of("down", y.shape[1])
    make = _down_of_one if y.shape[1] == 1 else _down_of_several
    part = make(active, y, inner, host, tile, how.is_interpreted)
    # Seen with rows of `ffn`, each row of a down matrix is one run of memory.
    seen = slots.reshape(slots.shape[0], -1, inner.shape[1])
    (seen,), ((answer,),) = launch("down", [part], how, shared=(seen,))
    slots = seen.reshape(slots.shape)
    if y.shape[1] == 1:
        return Answered(answer, slots, None)
    how = Launch(4, is_interpreted=how.is_interpreted)
    _, ((x, squares),) = launch("combine", [_combine_part(y, answer, inner.dtype)], how)
    return Answered(x, slots, squares)


def _combine_part(y: Array, answers: Array, dtype: jnp.dtype) -> Part:
    num_columns, hidden, batch = answers.shape
    rows = min(_COMBINED_ROWS, hidden & -hidden)

    def body(program, y_ref, answers_ref, x_ref, squares_ref):
        at = pl.ds(program * rows, rows)
        total = y_ref[at, :]
        for column in range(num_columns):
            total = total + answers_ref[column, at, :]
        x = total.astype(dtype)
        x_ref[at, :] = x
        squares_ref[program, :] = sum_squares(x)

    num_programs = hidden // rows
    outputs = (
        jax.ShapeDtypeStruct(y.shape, dtype),
        jax.ShapeDtypeStruct((num_programs, batch), jnp.float32),
    )
    return Part(num_programs, body, (y, answers), outputs)


def _down_of_one(active: Active, y, inner, host, tile: Tile, is_interpreted: bool) -> Part:
    """Each program reads its rows of all columns before it writes any: nothing gets lost."""
    num_columns, ffn, _ = inner.shape
    hidden = y.shape[0]
    rows = _rows(tile, hidden)

    cuts = pieces(ffn, tile.columns)

    def body(program, slots_ref, table_ref, weights_ref, y_ref, inner_ref, host_ref, out_ref):
        row = program * rows
        blocks = [
            _down_block(
                _Source.of_column(table_ref, column, slots_ref, host_ref), row, rows, ffn, hidden
            )
            for column in range(num_columns)
        ]

        def add_up(tiles):
            sums = {}
            for column, (block, found) in enumerate(zip(blocks, tiles, strict=True)):
                weight = weights_ref[column, 0]
                for (offset, length), weights in zip(cuts, found, strict=True):
                    values = inner_ref[column, pl.ds(offset, length), 0].astype(jnp.float32)
                    values = jnp.where(block.source.is_active, values * weight, 0.0)
                    product = weights.astype(jnp.float32) * values[None, :]
                    sums[length] = sums[length] + product if length in sums else product
            return sum(jnp.sum(product, axis=1) for product in sums.values())

        def read_slots():
            return add_up([[block.read_slot(*cut) for cut in cuts] for block in blocks])

        def read_through():
            tiles = [
                [block.read_if(block.source.is_active, *cut, rows) for cut in cuts]
                for block in blocks
            ]
            answer = add_up(tiles)
            _barrier(is_interpreted)
            for block, found in zip(blocks, tiles, strict=True):
                for cut, weights in zip(cuts, found, strict=True):
                    block.write_through(*cut, weights)
            return answer

        is_resident = blocks[0].source.is_active
        for block in blocks:
            is_resident = is_resident & block.source.is_active & block.has_landed
        # Without branches between them, all reads are under way at once.
        answer = jax.lax.cond(is_resident, read_slots, read_through)
        out_ref[pl.ds(row, rows), 0] = (y_ref[pl.ds(row, rows), 0] + answer).astype(out_ref.dtype)

    output = jax.ShapeDtypeStruct(y.shape, inner.dtype)
    inputs = (active.table, active.weights, y, inner, host)
    return Part(hidden // rows, body, inputs, (output,))


def _down_of_several(active: Active, y, inner, host, tile: Tile, is_interpreted: bool) -> Part:
    num_columns, ffn, batch = inner.shape
    hidden = y.shape[0]
    rows = _rows(tile, hidden)
    num_blocks = hidden // rows

    def body(program, slots_ref, table_ref, weights_ref, inner_ref, host_ref, out_ref):
        own = jax.lax.div(program, num_blocks)
        row = jax.lax.rem(program, num_blocks) * rows

        def compute(column):
            source = _Source.of_column(table_ref, column, slots_ref, host_ref)
            block = _down_block(source, row, rows, ffn, hidden)
            values = _at_once(inner_ref, column)
            (answer,) = _multiply([block], values, ffn, rows, tile.columns)
            out_ref[column, pl.ds(row, rows), :] = answer * weights_ref[column, :][None, :]

        @pl.when(table_ref[_active.ACTIVE, own] == 0)
        def _():
            out_ref[own, pl.ds(row, rows), :] = jnp.zeros((rows, batch), jnp.float32)

        _take_turns(table_ref, own, compute, is_interpreted)

    output = jax.ShapeDtypeStruct((num_columns, hidden, batch), jnp.float32)
    inputs = (active.table, active.weights, inner, host)
    return Part(num_columns * num_blocks, body, inputs, (output,))


class _Source(NamedTuple):
    """Where one column's expert is read, and whether it is written through."""

    slots_ref: jax.Ref
    host_ref: jax.Ref
    expert: Array
    slot: Array
    num_landed: Array
    is_written: Array
    is_active: Array

    @classmethod
    def of_column(cls, table_ref, column, slots_ref, host_ref) -> "_Source":
        """Reads the column's entries of `Active.table`."""
        return cls(
            slots_ref,
            host_ref,
            table_ref[_active.EXPERT, column],
            table_ref[_active.SLOT, column],
            table_ref[_active.LANDED, column],
            table_ref[_active.WRITE, column] > 0,
            table_ref[_active.ACTIVE, column] > 0,
        )


class _Block(NamedTuple):
    """Some rows of a matrix of one expert.

    Attributes:
      source: Where the expert lies.
      at: Index within the expert, as it lies in a slot, of so many columns from an offset on.
      at_host: The same as it lies in host memory; None where it lies alike.
      has_landed: Whether all of the rows are in the slot; if not, all are read from the host.
    """

    source: _Source
    at: Callable[[int | Array, int], tuple]
    has_landed: Array
    at_host: Callable[[int | Array, int], tuple] | None = None

    def read_slot(self, offset: int | Array, length: int) -> Array:
        """Reads columns of what has landed."""
        return self.source.slots_ref[(self.source.slot, *self.at(offset, length))]

    def read(self, offset: int | Array, length: int) -> Array:
        """Reads columns from where they are."""
        source, at_host = self.source, self.at_host or self.at
        return jax.lax.cond(
            self.has_landed,
            lambda: self.read_slot(offset, length),
            lambda: source.host_ref[(source.expert, *at_host(offset, length))],
        )

    def read_if(self, is_needed: Array, offset: int, length: int, rows: int) -> Array:
        """The same where needed, else zeros."""
        dtype = self.source.slots_ref.dtype
        return jax.lax.cond(
            is_needed, lambda: self.read(offset, length), lambda: jnp.zeros((rows, length), dtype)
        )

    def write_through(self, offset: int | Array, length: int, weights: Array) -> None:
        """Puts columns that were read from the host into the slot, if they are to stay there."""
        source = self.source

        @pl.when(source.is_written & jnp.logical_not(self.has_landed))
        def _():
            source.slots_ref[(source.slot, *self.at(offset, length))] = weights


def _down_block(source: _Source, row: Array, rows: int, ffn: int, hidden: int) -> _Block:
    """Rows of the down matrix, which in host memory go on from one packed row to the next.

    There no view with rows of `ffn` is needed. Unsigned division keeps the compiler sure that
    runs of columns are runs in memory.
    """
    first = 2 * ffn * hidden + row * ffn

    def at(offset, length):
        return pl.ds(2 * hidden + row, rows), pl.ds(offset, length)

    def at_host(offset, length):
        start = (jnp.asarray(first) + offset).astype(jnp.uint32)
        line = jax.lax.broadcasted_iota(jnp.uint32, (rows, length), 0)
        place = jax.lax.broadcasted_iota(jnp.uint32, (rows, length), 1)
        element = start + line * jnp.uint32(ffn) + place
        width = jnp.full((rows, length), hidden, jnp.uint32)
        return jax.lax.div(element, width), jax.lax.rem(element, width)

    return _Block(source, at, first + rows * ffn <= source.num_landed * hidden, at_host)


def _take_turns(
    table_ref, column: Array, compute: Callable[[Array], None], is_interpreted: bool
) -> None:
    """Computes a column, and first the one whose slot it takes; another's partner waits for it."""
    partner = table_ref[_active.PARTNER, column]
    is_needed = (table_ref[_active.ACTIVE, column] > 0) & (table_ref[_active.SKIP, column] == 0)
    has_partner = (partner >= 0).astype(jnp.int32)

    def turn(number, carry):
        is_second = number > 0

        @pl.when(is_second)
        def _():
            _barrier(is_interpreted)

        compute(jnp.where(is_second, column, jnp.maximum(partner, 0)))
        return carry

    jax.lax.fori_loop(1 - has_partner, 1 + is_needed.astype(jnp.int32), turn, 0)


def _barrier(is_interpreted: bool) -> None:
    """All threads of a program have read before any goes on; interpreted programs have one."""
    if not is_interpreted:
        triton.debug_barrier()


def _sum_products(blocks: list[_Block], x_ref, columns: int) -> list[Array]:
    """Rows of each block times one request's activations."""
    cuts = pieces(x_ref.shape[0], columns)
    tiles = [[block.read(*cut) for cut in cuts] for block in blocks]
    values = [x_ref[pl.ds(*cut), 0].astype(jnp.float32)[None, :] for cut in cuts]
    sums = []
    for found in tiles:
        total = jnp.zeros(found[0].shape[0], jnp.float32)
        for weights, value in zip(found, values, strict=True):
            total = total + jnp.sum(weights.astype(jnp.float32) * value, axis=1)
        sums.append(total)
    for block, found in zip(blocks, tiles, strict=True):
        for cut, weights in zip(cuts, found, strict=True):
            block.write_through(*cut, weights)
    return sums


def _multiply(
    blocks: list[_Block], values: Callable, size: int, rows: int, columns: int
) -> list[Array]:
    """Rows of each block times several requests' activations.

    What lies in slots is read in a loop of its own without a branch, which can be pipelined.
    """
    num_whole = size // columns

    def run(read):
        def add(sums, offset, length):
            operand = values(offset, length)
            return [
                old + _dot(read(block, offset, length), operand)
                for old, block in zip(sums, blocks, strict=True)
            ]

        sums = [jnp.zeros((rows, values(0, 16).shape[1]), jnp.float32) for _ in blocks]
        if num_whole:
            sums = jax.lax.fori_loop(0, num_whole, lambda i, s: add(s, i * columns, columns), sums)
        for offset, length in pieces(size % columns):
            sums = add(sums, num_whole * columns + offset, length)
        return sums

    def read_through(block, offset, length):
        weights = block.read(offset, length)
        block.write_through(offset, length, weights)
        return weights

    all_landed = blocks[0].has_landed
    for block in blocks[1:]:
        all_landed = all_landed & block.has_landed
    return jax.lax.cond(all_landed, lambda: run(_Block.read_slot), lambda: run(read_through))


def _dot(weights: Array, values: Array) -> Array:
    """A product on the tensor cores, float32 not rounded to fewer bits before."""
    return triton.dot(weights, values, allow_tf32=False if weights.dtype == jnp.float32 else None)


def _at_once(ref, *at) -> Callable[[int | Array, int], Array]:
    """Reads features of all requests from an offset on."""
    return lambda offset, length: ref[(*at, pl.ds(offset, length), slice(None))]


def _activated(gate: Array, up: Array, dtype) -> Array:
    return (jax.nn.silu(gate) * up).astype(dtype)


def _rows(tile: Tile, size: int) -> int:
    """Rows of a program: a power of two that divides the rows there are."""
    return min(tile.rows, size & -size)
