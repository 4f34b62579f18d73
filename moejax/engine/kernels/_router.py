"""The router of a layer: a short kernel that everything after attention waits for."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from ._dense import Tile, read_normed, tile_for
from ._dense_weights import NUM_GATE_ROWS, DenseLayers
from ._parts import Part, pieces
from ._products import write


def router_part(
    layer: Int32[Array, " 1"],
    weights: DenseLayers,
    x: Float[Array, "hidden batch"],
    eps: float,
    *,
    squares: Float[Array, "parts batch"] | None = None,
    num_ahead: int = 0,
    tile: Tile | None = None,
) -> Part:
    """What the experts wait for: the normed stream, and what the router says of it.

    Args:
      layer: Number of the layer.
      weights: Weights of all layers.
      x: Residual stream after attention.
      eps: Added to the mean square in the norm.
      squares: Sums over parts of its squares, where they are known; see `output_part`.
      num_ahead: How many of the following layers' norms and routers also see this stream; after
        the last layer follows the first.
      tile: How to cut the products; None takes `TILES`.

    Returns:
      A part with the outputs router logits, float32 [padded_experts + 16, batch], of which row
      `padded_experts` belongs to the shared expert's gate, rounded to the type of `x` as the model
      does it; the normed stream [hidden, batch]; and with `num_ahead` the logits of the following
      layers, float32 [num_ahead, padded_experts, batch].
    """
    batch = x.shape[1]
    tile = tile or tile_for("router", x)
    num_layers, num_logits, hidden = weights.router.shape
    num_experts, given = num_logits - NUM_GATE_ROWS, () if squares is None else (squares,)
    # The first programs write the normed stream, the others answer for one row of a router each.
    cuts = pieces(hidden, tile.columns)
    num_refs = 6 + len(given) + (num_ahead > 0)

    def body(program, *refs):
        layer_ref, norm_ref, router_ref, x_ref, *others = refs[-num_refs:]
        known, outputs = others[: len(given)], others[len(given) :]
        number = layer_ref[0]

        def answer(of_layer, row):
            normed = read_normed(x_ref, norm_ref, (of_layer,), eps, tile.columns, *known)
            total = jnp.zeros((batch,), jnp.float32)
            for offset, length in cuts:
                row_weights = router_ref[of_layer, row, pl.ds(offset, length)]
                values = normed(offset, length).astype(jnp.float32).reshape(length, batch)
                total += jnp.sum(row_weights.astype(jnp.float32)[:, None] * values, axis=0)
            return total.astype(x_ref.dtype).astype(jnp.float32)

        for turn, (offset, length) in enumerate(cuts):

            @pl.when(program == turn)
            def _(offset=offset, length=length):
                normed = read_normed(x_ref, norm_ref, (number,), eps, tile.columns, *known)
                write(outputs[1], offset, length, normed(offset, length).astype(x_ref.dtype))

        row = program - len(cuts)

        @pl.when((row >= 0) & (row < num_logits))
        def _():
            outputs[0][row, :] = answer(number, row)

        if num_ahead:

            @pl.when(row >= num_logits)
            def _():
                place = row - num_logits
                ahead, expert = jax.lax.div(place, num_experts), jax.lax.rem(place, num_experts)
                other = jax.lax.rem(number + 1 + ahead, num_layers)
                outputs[2][ahead, expert, :] = answer(other, expert)

    ahead = jax.ShapeDtypeStruct((num_ahead, num_experts, batch), jnp.float32)
    return Part(
        num_programs=len(cuts) + num_logits + num_ahead * num_experts,
        body=body,
        inputs=(layer, weights.post_norm, weights.router, x, *given),
        outputs=(
            jax.ShapeDtypeStruct((num_logits, batch), jnp.float32),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *([ahead] if num_ahead else []),
        ),
    )
