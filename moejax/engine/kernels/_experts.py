"""The routed experts' products: from slots, or from host memory and through into a slot.

Where the weights of an expert lie decides only where they are read. Tiles and the order of sums
are the same, so that no bit of the answer depends on what is resident.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from . import _active
from ._active import Active
from ._blocks import (
    Block,
    Source,
    at_once,
    barrier,
    down_block,
    multiply,
    sum_products,
    take_turns,
)
from ._dense import Tile, sum_squares
from ._parts import Launch, Part, launch, pieces

TILES = {
    "experts": (Tile(2, 2048, 8), Tile(16, 128, 2, 5)),
    "down": (Tile(1, 1024, 1), Tile(32, 128, 4, 4)),
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
            source = Source.of_column(table_ref, column, slots_ref, host_ref)

            def block(first):
                def at(offset, length):
                    return pl.ds(first, rows), pl.ds(offset, length)

                return Block(source, at, first + rows <= source.num_landed)

            blocks = [block(row), block(ffn + row)]
            if batch == 1:
                gate, up = sum_products(blocks, x_ref, tile.columns)
                out_ref[column, pl.ds(row, rows), 0] = _activated(gate, up, out_ref.dtype)
            else:
                gate, up = multiply(blocks, at_once(x_ref), hidden, rows, tile.columns)
                out_ref[column, pl.ds(row, rows), :] = _activated(gate, up, out_ref.dtype)

        take_turns(table_ref, jax.lax.div(program, num_blocks), compute, is_interpreted)

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
    dtype: DTypeLike | None = None,
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
      dtype: Type of the new stream; that of `inner` by default.
    """
    tile, dtype = tile or tiles_of("down", y.shape[1]), jnp.dtype(dtype or inner.dtype)
    if y.shape[1] == 1:
        part = _down_of_one(active, y, inner, host, tile, how.is_interpreted, dtype)
    else:
        part = _down_of_several(active, y, inner, host, tile, how.is_interpreted)
    # Seen with rows of `ffn`, each row of a down matrix is one run of memory.
    seen = slots.reshape(slots.shape[0], -1, inner.shape[1])
    (seen,), ((answer,),) = launch("down", [part], how, shared=(seen,))
    slots = seen.reshape(slots.shape)
    if y.shape[1] == 1:
        return Answered(answer, slots, None)
    how = Launch(4, is_interpreted=how.is_interpreted)
    _, ((x, squares),) = launch("combine", [_combine_part(y, answer, dtype)], how)
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


def _down_of_one(
    active: Active, y, inner, host, tile: Tile, is_interpreted: bool, dtype: jnp.dtype
) -> Part:
    """Each program reads its rows of all columns before it writes any: nothing gets lost."""
    num_columns, ffn, _ = inner.shape
    hidden = y.shape[0]
    rows = _rows(tile, hidden)

    cuts = pieces(ffn, tile.columns)

    def body(program, slots_ref, table_ref, weights_ref, y_ref, inner_ref, host_ref, out_ref):
        row = program * rows
        blocks = [
            down_block(
                Source.of_column(table_ref, column, slots_ref, host_ref), row, rows, ffn, hidden
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
            barrier(is_interpreted)
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

    output = jax.ShapeDtypeStruct(y.shape, dtype)
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
            source = Source.of_column(table_ref, column, slots_ref, host_ref)
            block = down_block(source, row, rows, ffn, hidden)
            values = at_once(inner_ref, column)
            (answer,) = multiply([block], values, ffn, rows, tile.columns)
            out_ref[column, pl.ds(row, rows), :] = answer * weights_ref[column, :][None, :]

        @pl.when(table_ref[_active.ACTIVE, own] == 0)
        def _():
            out_ref[own, pl.ds(row, rows), :] = jnp.zeros((rows, batch), jnp.float32)

        take_turns(table_ref, own, compute, is_interpreted)

    output = jax.ShapeDtypeStruct((num_columns, hidden, batch), jnp.float32)
    inputs = (active.table, active.weights, inner, host)
    return Part(num_columns * num_blocks, body, inputs, (output,))


def _activated(gate: Array, up: Array, dtype) -> Array:
    return (jax.nn.silu(gate) * up).astype(dtype)


def _rows(tile: Tile, size: int) -> int:
    """Rows of a program: a power of two that divides the rows there are."""
    return min(tile.rows, size & -size)
