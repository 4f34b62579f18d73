"""Pure functions of small arrays as kernels of one program: what a strategy's step is.

All leaves of the inputs are loaded whole, the function is called, and all leaves of what it
returns are stored. Kernels know neither booleans nor numbers without a shape in memory: booleans
are kept as int32, and a number as an array of one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.engine.kernels._parts import Part


def as_part(
    function: Callable[[Any], Any], inputs: Any
) -> tuple[Part, Callable[[Sequence[Array]], Any]]:
    """A pure function as a part of one program.

    Args:
      function: Takes one pytree of arrays to another, in operations that Pallas Triton lowers;
        axes are powers of two.
      inputs: What it is called with.

    Returns:
      The part, and what turns the part's outputs into what the function returns.
    """
    results = jax.eval_shape(function, inputs)
    num_inputs = len(jax.tree.leaves(inputs))

    def body(program, *refs):
        loaded = load(refs[:num_inputs], inputs)
        store(refs[num_inputs:], function(loaded))

    part = Part(
        num_programs=1,
        body=body,
        inputs=tuple(_stored(jnp.asarray(leaf)) for leaf in jax.tree.leaves(inputs)),
        outputs=tuple(_stored_shape(leaf) for leaf in jax.tree.leaves(results)),
    )
    return part, lambda outputs: _restored(outputs, results)


def load(refs: Sequence[Any], like: Any, layer: Int[Array, ""] | None = None) -> Any:
    """Reads a pytree from references, one a leaf.

    Args:
      refs: In the order of `jax.tree.leaves(like)`.
      like: Says shape and type of every leaf.
      layer: Where every reference is stacked over layers, the one to read; None where none is.
    """
    leaves, structure = jax.tree.flatten(like)
    loaded = [
        _boolean(ref[_place(leaf, layer)], leaf) for ref, leaf in zip(refs, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, loaded)


def store(refs: Sequence[Any], values: Any, layer: Int[Array, ""] | None = None) -> None:
    """Writes a pytree into references; the counterpart of `load`."""
    for ref, leaf in zip(refs, jax.tree.leaves(values), strict=True):
        ref[_place(leaf, layer)] = leaf.astype(ref.dtype)


def _place(leaf: Any, layer: Int[Array, ""] | None) -> Any:
    whole = (slice(None),) * leaf.ndim
    if layer is not None:
        return (layer, *whole)
    return whole or (0,)


def _boolean(value: Array, like: Any) -> Array:
    return value != 0 if like.dtype == jnp.bool_ else value


def _stored(leaf: Array) -> Array:
    leaf = leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf
    return leaf.reshape(leaf.shape or (1,))


def _stored_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype = jnp.int32 if leaf.dtype == jnp.bool_ else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape or (1,), dtype)


def _restored(outputs: Sequence[Array], like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    restored = [
        _boolean(output, leaf).reshape(leaf.shape)
        for output, leaf in zip(outputs, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)
