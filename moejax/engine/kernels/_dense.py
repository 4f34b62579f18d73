"""The dense products of a decode step: all but attention and the routed experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from ._dense_weights import NUM_GATE_ROWS, DenseLayers, DenseWeights
from ._parts import Launch, Part, launch, pieces
from ._products import Reader, first_row, fit_rows, products, read_activations, read_matrix, write


class Tile(NamedTuple):
    """How a product is cut into programs, and how a kernel of such programs runs best.

    Attributes:
      rows: Rows of the matrix that one program multiplies, a power of two; at least 16 for
        several requests.
      columns: Columns it reads at a time, a power of two.
      num_warps: Warps of each program; the launch decides.
      num_stages: Reads under way while several requests are multiplied; the launch decides.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1


TILES = {
    "qkv": (Tile(4, 2048, 4), Tile(16, 256, 4, 3)),
    "output": (Tile(1, 2048, 1), Tile(16, 256, 4, 3)),
    "router": (Tile(1, 2048, 1), Tile(1, 512, 4)),
    "shared_up": (Tile(2, 2048, 4), Tile(16, 256, 8, 3)),
    "shared_down": (Tile(4, 2048, 8), Tile(16, 128, 2, 5)),
    "head": (Tile(4, 2048, 4), Tile(32, 256, 4, 3)),
}
"""Cut of each product: for one request, measured on an H100, and for up to 16, estimated.

The latter take at most 64 KiB of shared memory, of the 99 that an RTX 3090 has.
"""


def tile_of(name: str, batch_pad: int) -> Tile:
    """The cut of a product in `TILES` for so many columns of activations."""
    return TILES[name][batch_pad > 1]


def qkv_part(
    layer: Int32[Array, " 1"],
    weights: DenseLayers,
    x: Float[Array, "hidden batch"],
    eps: float,
    *,
    squares: Float[Array, "parts batch"] | None = None,
    tile: Tile | None = None,
) -> Part:
    """Queries, keys and values of the normed stream, with their bias.

    Args:
      layer: Number of the layer.
      weights: Weights of all layers.
      x: Residual stream.
      eps: Added to the mean square in the norm.
      squares: Sums over parts of its squares, where they are known; see `output_part`.
      tile: How to cut the product; None takes `TILES`.

    Returns:
      A part with one output, [qkv, batch] in the type of `x`.
    """
    batch = x.shape[1]
    tile = tile or tile_for("qkv", x)
    size, hidden = weights.qkv.shape[1:]
    rows, given = fit_rows(tile.rows, size), () if squares is None else (squares,)
    num_refs = 6 + len(given)

    def body(program, *refs):
        layer_ref, norm_ref, weight_ref, bias_ref, x_ref, *known, out_ref = refs[-num_refs:]
        number = layer_ref[0]
        row = first_row(program, rows, size)
        normed = read_normed(x_ref, norm_ref, (number,), eps, tile.columns, *known)
        read = read_matrix(weight_ref, (number,), row, rows)
        (y,) = products([read], normed, hidden, rows, tile.columns, batch)
        bias = bias_ref[number, pl.ds(row, rows)]
        # Rounded before the bias is added, as the model's `Linear` does.
        y = y.astype(out_ref.dtype) + (bias if batch == 1 else bias[:, None])
        write(out_ref, row, rows, y)

    return Part(
        num_programs=pl.cdiv(size, rows),
        body=body,
        inputs=(layer, weights.input_norm, weights.qkv, weights.qkv_bias, x, *given),
        outputs=(jax.ShapeDtypeStruct((size, batch), x.dtype),),
    )


def output_part(
    layer: Int32[Array, " 1"],
    weights: DenseLayers,
    x: Float[Array, "hidden batch"],
    attended: Float[Array, "queries batch"],
    *,
    tile: Tile | None = None,
) -> Part:
    """The stream after attention: the attended values projected and added to it.

    Args:
      layer: Number of the layer.
      weights: Weights of all layers.
      x: Residual stream.
      attended: What the heads gathered.
      tile: How to cut the product; None takes `TILES`.

    Returns:
      A part with the stream [hidden, batch] and, for several requests, the sums of its squares
      over each program's rows, float32 [parts, batch]: the next norm's work half done.
    """
    batch = x.shape[1]
    tile = tile or tile_for("output", x)
    size, num_columns = weights.output.shape[1:]
    rows = fit_rows(tile.rows, size)

    def body(program, *refs):
        layer_ref, weight_ref, x_ref, attended_ref, out_ref, *square_refs = refs[-num_refs:]
        row = first_row(program, rows, size)
        read = read_matrix(weight_ref, (layer_ref[0],), row, rows)
        (y,) = products(
            [read], read_activations(attended_ref), num_columns, rows, tile.columns, batch
        )
        stream = read_activations(x_ref)(row, rows) + y.astype(out_ref.dtype)
        write(out_ref, row, rows, stream)
        for square_ref in square_refs:
            square_ref[program, :] = sum_squares(stream)

    num_programs = pl.cdiv(size, rows)
    # Rows of the last two programs would be counted twice where they overlap.
    has_squares = batch > 1 and size % rows == 0
    squares = jax.ShapeDtypeStruct((num_programs, batch), jnp.float32)
    num_refs = 5 + has_squares
    return Part(
        num_programs=num_programs,
        body=body,
        inputs=(layer, weights.output, x, attended),
        outputs=(jax.ShapeDtypeStruct(x.shape, x.dtype), *([squares] if has_squares else [])),
    )


def sum_squares(x: Float[Array, "rows batch"]) -> Float[Array, " batch"]:
    """Sum over some rows of the stream's squares, in float32."""
    wide = x.astype(jnp.float32)
    return jnp.sum(wide * wide, axis=0)


def shared_up_part(
    layer: Int32[Array, " 1"],
    weights: DenseLayers,
    normed: Float[Array, "hidden batch"],
    *,
    tile: Tile | None = None,
) -> Part:
    """The shared expert's hidden values: silu(gate) * up.

    Args:
      layer: Number of the layer.
      weights: Weights of all layers.
      normed: The normed stream.
      tile: How to cut the products; None takes `TILES`.

    Returns:
      A part with one output, [ffn, batch].
    """
    batch = normed.shape[1]
    tile = tile or tile_for("shared_up", normed)
    hidden, num_ffn = normed.shape[0], weights.shared_down.shape[2]
    rows = fit_rows(tile.rows, num_ffn)

    def body(program, *refs):
        layer_ref, weight_ref, x_ref, out_ref = refs[-4:]
        row = first_row(program, rows, num_ffn)
        readers = [
            read_matrix(weight_ref, (layer_ref[0],), start + row, rows) for start in (0, num_ffn)
        ]
        gate, up = products(readers, read_activations(x_ref), hidden, rows, tile.columns, batch)
        write(out_ref, row, rows, (jax.nn.silu(gate) * up).astype(out_ref.dtype))

    return Part(
        num_programs=pl.cdiv(num_ffn, rows),
        body=body,
        inputs=(layer, weights.shared_gate_up, normed),
        outputs=(jax.ShapeDtypeStruct((num_ffn, batch), normed.dtype),),
    )


def shared_down_part(
    layer: Int32[Array, " 1"],
    weights: DenseLayers,
    x: Float[Array, "hidden batch"],
    router_logits: Float[Array, "logits batch"],
    shared_hidden: Float[Array, "ffn batch"],
    *,
    tile: Tile | None = None,
) -> Part:
    """The stream with the shared expert's answer, behind its sigmoid gate, added to it.

    Args:
      layer: Number of the layer.
      weights: Weights of all layers.
      x: Residual stream after attention.
      router_logits: As `router_part` gives them.
      shared_hidden: The shared expert's hidden values.
      tile: How to cut the product; None takes `TILES`.

    Returns:
      A part with one output, float32 [hidden, batch], to which the routed experts are added.
    """
    batch = x.shape[1]
    tile = tile or tile_for("shared_down", x)
    size, num_columns = weights.shared_down.shape[1:]
    rows, gate_row = fit_rows(tile.rows, size), router_logits.shape[0] - NUM_GATE_ROWS

    def body(program, *refs):
        layer_ref, weight_ref, x_ref, logits_ref, hidden_ref, out_ref = refs[-6:]
        row = first_row(program, rows, size)
        read = read_matrix(weight_ref, (layer_ref[0],), row, rows)
        (y,) = products(
            [read], read_activations(hidden_ref), num_columns, rows, tile.columns, batch
        )
        gate = logits_ref[gate_row, 0] if batch == 1 else logits_ref[gate_row, :][None, :]
        stream = read_activations(x_ref)(row, rows).astype(jnp.float32)
        write(out_ref, row, rows, stream + jax.nn.sigmoid(gate) * y)

    return Part(
        num_programs=pl.cdiv(size, rows),
        body=body,
        inputs=(layer, weights.shared_down, x, router_logits, shared_hidden),
        outputs=(jax.ShapeDtypeStruct(x.shape, jnp.float32),),
    )


def head(
    weights: DenseWeights,
    x: Float[Array, "hidden batch"],
    eps: float,
    how: Launch | None = None,
    *,
    squares: Float[Array, "parts batch"] | None = None,
    tile: Tile | None = None,
) -> Float[Array, "vocab batch"]:
    """Scores of the next token.

    Args:
      weights: The model.
      x: Residual stream after the last layer.
      eps: Added to the mean square in the norm.
      how: How the kernel runs; None takes what is best for the tile.
      squares: Sums over parts of the stream's squares, where they are known; see `output_part`.
      tile: How to cut the product; None takes `TILES`.
    """
    batch = x.shape[1]
    tile = tile or tile_for("head", x)
    size, hidden = weights.head.shape
    rows = fit_rows(tile.rows, size)

    given = () if squares is None else (squares,)

    def body(program, norm_ref, weight_ref, x_ref, *others):
        *known, out_ref = others
        row = first_row(program, rows, size)
        normed = read_normed(x_ref, norm_ref, (), eps, tile.columns, *known)
        read = read_matrix(weight_ref, (), row, rows)
        (y,) = products([read], normed, hidden, rows, tile.columns, batch)
        write(out_ref, row, rows, y)

    part = Part(
        num_programs=pl.cdiv(size, rows),
        body=body,
        inputs=(weights.final_norm, weights.head, x, *given),
        outputs=(jax.ShapeDtypeStruct((size, batch), jnp.float32),),
    )
    _, ((logits,),) = launch("head", [part], how or Launch(tile.num_warps, tile.num_stages))
    return logits


def tile_for(name: str, x: Array) -> Tile:
    """The usual cut; of float32 fewer columns at a time, so that registers still hold them."""
    tile = tile_of(name, x.shape[1])
    is_wide = x.shape[1] > 1 and x.dtype.itemsize > 2
    return tile._replace(columns=tile.columns // 4) if is_wide else tile


def read_normed(x_ref, norm_ref, at: tuple, eps: float, columns: int, squares_ref=None) -> Reader:
    """Reads the normed stream, which every program norms anew: cheaper than a kernel before."""
    read = read_activations(x_ref)
    hidden, batch = x_ref.shape
    if batch == 1:
        wide = {where: read(*where).astype(jnp.float32) for where in pieces(hidden, columns)}
        squares = sum(jnp.sum(x * x) for x in wide.values())
        scale = jax.lax.rsqrt(squares / hidden + eps)
        return lambda offset, length: (
            norm_ref[(*at, pl.ds(offset, length))]
            * (wide[offset, length] * scale).astype(norm_ref.dtype)
        )

    def add(squares, offset, length):
        wide = read(offset, length).astype(jnp.float32)
        return squares + jnp.sum(wide * wide, axis=0)

    num_whole = hidden // columns
    squares = jnp.zeros((batch,), jnp.float32)
    if squares_ref is not None:
        for offset, length in pieces(squares_ref.shape[0]):
            squares += squares_ref[pl.ds(offset, length), :].sum(0)
    else:
        if num_whole:
            squares = jax.lax.fori_loop(
                0, num_whole, lambda i, s: add(s, i * columns, columns), squares
            )
        for offset, length in pieces(hidden % columns):
            squares = add(squares, num_whole * columns + offset, length)
    scale = jax.lax.rsqrt(squares / hidden + eps)[None, :]
    return lambda offset, length: (
        norm_ref[(*at, pl.ds(offset, length))][:, None]
        * (read(offset, length).astype(jnp.float32) * scale).astype(norm_ref.dtype)
    )
