"""Kernels whose grid is shared by several independent pieces of work.

A decode step is a chain of short kernels, each bound by the bytes it reads. What does not lie on
that chain (copying a prefetched expert, choosing victims, learning from an event) rides along as
extra programs of a kernel that is running anyway. Programs placed first in a grid start first:
16 to 32 that copy overlap with the others within a tenth, placed last they would not overlap.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Int32


class Part(NamedTuple):
    """One piece of work in a kernel.

    Attributes:
      num_programs: Programs of the grid that do it.
      body: Called as `body(program, *shared_refs, *input_refs, *output_refs)` with the number of
        the program within the part, from 0.
      inputs: Arrays that only this part reads.
      outputs: Shapes and types of what only this part writes.
      updates: Places in `inputs` that are updated in place, and the output that each becomes.
    """

    num_programs: int
    body: Callable[..., None]
    inputs: tuple[Any, ...] = ()
    outputs: tuple[jax.ShapeDtypeStruct, ...] = ()
    updates: tuple[tuple[int, int], ...] = ()


class Launch(NamedTuple):
    """How a kernel runs.

    Attributes:
      num_warps: Warps of each program, 32 threads a warp.
      num_stages: Depth of software pipelining of loops.
      is_interpreted: Whether Pallas interprets the kernel instead of compiling it: slow, exact,
        and possible without a GPU.
    """

    num_warps: int = 4
    num_stages: int = 1
    is_interpreted: bool = False


def launch(
    name: str, parts: Sequence[Part | None], how: Launch, *, shared: tuple[Array, ...] = ()
) -> tuple[tuple[Array, ...], list[tuple[Array, ...]]]:
    """Runs the parts as one kernel.

    Args:
      name: What a profiler shows.
      parts: Earlier ones start first; None is left out.
      how: Warps and the like, the same for all parts.
      shared: Arrays updated in place that every part may write, such as the slots.

    Returns:
      The shared arrays and, for each part that is not None, its outputs.
    """
    present = [part for part in parts if part is not None]
    operands, shapes = list(shared), [_shape_of(array) for array in shared]
    aliases = {index: index for index in range(len(shared))}
    for part in present:
        for index, output in part.updates:
            aliases[len(operands) + index] = len(shapes) + output
        operands += part.inputs
        shapes += part.outputs

    def kernel(*refs):
        ins, outs = refs[: len(operands)], refs[len(operands) :]
        # Of an array that is updated in place only the output may be read and written.
        common = outs[: len(shared)]
        ins, outs, first = ins[len(shared) :], outs[len(shared) :], 0
        program = pl.program_id(0)
        for part in present:
            mine, ins = list(ins[: len(part.inputs)]), ins[len(part.inputs) :]
            results, outs = outs[: len(part.outputs)], outs[len(part.outputs) :]
            for index, output in part.updates:
                mine[index] = results[output]
            last = first + part.num_programs

            @pl.when((program >= first) & (program < last))
            def _(part=part, mine=mine, results=results, first=first):
                part.body(program - first, *common, *mine, *results)

            first = last

    kernel.__name__ = kernel.__qualname__ = name
    options: dict[str, Any] = (
        {"interpret": True}
        if how.is_interpreted
        else {
            "compiler_params": triton.CompilerParams(
                num_warps=how.num_warps, num_stages=how.num_stages
            )
        }
    )
    results = pl.pallas_call(
        kernel,
        grid=(sum(part.num_programs for part in present),),
        out_shape=shapes,
        input_output_aliases=aliases,
        name=name,
        **options,
    )(*operands)
    updated, rest, by_part = tuple(results[: len(shared)]), results[len(shared) :], []
    for part in present:
        by_part.append(tuple(rest[: len(part.outputs)]))
        rest = rest[len(part.outputs) :]
    return updated, by_part


def pieces(size: int, most: int = 4096) -> tuple[tuple[int, int], ...]:
    """Splits `size` into powers of two of at most `most`: (offset, length) of each.

    Tiles of Triton have powers of two as sides; 1,408 columns are read as 1,024, 256 and 128.
    """
    found, offset = [], 0
    while offset < size:
        length = min(most, 1 << ((size - offset).bit_length() - 1))
        found.append((offset, length))
        offset += length
    return tuple(found)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def layer_number(layer: int) -> Int32[Array, " 1"]:
    """A layer's number as an operand, so that all layers share one compiled kernel."""
    return jnp.asarray([layer], jnp.int32)


def _shape_of(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
