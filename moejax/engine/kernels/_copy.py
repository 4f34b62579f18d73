"""Copying a prefetched expert a few rows at a time, in the shadow of kernels that run anyway."""

import math
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from moejax.errors import UsageError

from ._parts import Part, pieces

LAYER, EXPERT, SLOT, ISSUED, VALID = range(5)
"""Fields of a job: the expert `EXPERT` of layer `LAYER` goes into slot `SLOT`; its prefetch was
chosen in event `ISSUED` and is copied from the next event on, while `VALID` is 1."""

NUM_FIELDS = 8

# Microseconds of each kernel on an H100 when all experts are resident: what it can hide. The
# routed experts' last product sees the slots with other rows and copies nothing.
_SHARES = {"qkv": 11.5, "route": 18.0, "experts": 26.5}
# 16 programs already fill the link; those of one warp have less of it under way each.
_NUM_PROGRAMS, _NUM_NARROW_PROGRAMS = 16, 64
# More rows at a time than these spill registers, in programs of several warps and of one.
_ROWS, _NARROW_ROWS = 4, 1


class Schedule(NamedTuple):
    """How many rows of the expert under way each kernel of a layer copies.

    Attributes:
      qkv: Rows copied beside queries, keys and values.
      route: Rows copied beside the shared expert's gate and up, while experts are chosen.
      experts: Rows copied beside the routed experts' gate and up.
      layers_per_copy: An expert chosen in event i has landed when the experts of event
        i + `layers_per_copy` are computed, and not an event before.
    """

    qkv: int
    route: int
    experts: int
    layers_per_copy: int

    @property
    def rows_per_event(self) -> int:
        """Rows that one layer copies."""
        return self.rows_before_experts + self.experts

    @property
    def rows_before_experts(self) -> int:
        """Rows that one layer copies before its routed experts are computed."""
        return self.qkv + self.route

    def rows_before(self, kernel: str) -> int:
        """Rows that a layer has copied when `kernel` starts."""
        return sum(self[: self._fields.index(kernel)])


class Prefetch(NamedTuple):
    """What the copying programs read.

    Attributes:
      job: The prefetch under way, fields as named above.
      step: Number of the step.
      hosts: Packed experts of this layer and of the next ones, as many as a prefetch looks ahead.
    """

    job: Int32[Array, " fields"]
    step: Int32[Array, " 1"]
    hosts: tuple[Array, ...]


def schedule(num_rows: int, layers_per_copy: int) -> Schedule:
    """Spreads the copy of one expert over the kernels of `layers_per_copy` layers.

    Args:
      num_rows: Rows of one packed expert.
      layers_per_copy: Layers from the choice of an expert to its use.

    Returns:
      Rows in proportion to the time of each kernel.

    Raises:
      UsageError: There are no layers, or too many for so few rows.
    """
    if layers_per_copy < 1:
        raise UsageError(
            f"a copy that takes {layers_per_copy} layers is none", "Use 1 layer or more."
        )
    ends = dict(zip(_SHARES, accumulate(_SHARES.values()), strict=True))
    whole = ends["experts"]
    rows_per_event = num_rows / (layers_per_copy - 1 + ends["route"] / whole)
    last_rows = [math.ceil(rows_per_event * end / whole) for end in ends.values()]
    rows = [last - first for first, last in zip([0, *last_rows[:-1]], last_rows, strict=True)]
    found = Schedule(**dict(zip(_SHARES, rows, strict=True)), layers_per_copy=layers_per_copy)
    num_copied = (layers_per_copy - 2) * found.rows_per_event + found.rows_before_experts
    if not num_copied < num_rows <= num_copied + found.rows_per_event:
        raise UsageError(
            f"an expert of {num_rows} rows cannot be spread over {layers_per_copy} layers",
            "Use fewer layers for a copy.",
        )
    return found


def copy_part(
    prefetch: Prefetch,
    layer: Int32[Array, " 1"],
    num_layers: int,
    schedule: Schedule,
    kernel: str,
    num_warps: int,
    is_live: Int32[Array, " 1"] | None = None,
) -> Part | None:
    """Programs that copy the rows that are one kernel's share; they go first in its grid.

    The kernel's shared array is the slots, [slots, rows, hidden].

    Args:
      prefetch: What is copied.
      layer: Number of the layer that runs.
      num_layers: Layers of the model.
      schedule: Rows of each kernel.
      kernel: Name of the kernel in `schedule`.
      num_warps: Warps of its programs.
      is_live: 0 stops a prefetch that is not wanted any more; by default it goes on.

    Returns:
      A part without outputs, or None if the kernel copies nothing.
    """
    num_rows, num_rows_before = getattr(schedule, kernel), schedule.rows_before(kernel)
    if not num_rows:
        return None
    is_narrow = num_warps == 1
    num_programs = _NUM_NARROW_PROGRAMS if is_narrow else _NUM_PROGRAMS
    num_hosts = len(prefetch.hosts)
    conditions = () if is_live is None else (is_live,)

    def body(program, slots_ref, layer_ref, job_ref, step_ref, *refs):
        live_refs, host_refs = refs[:-num_hosts], refs[-num_hosts:]
        layer_number = layer_ref[0]
        event = step_ref[0] * num_layers + layer_number
        target, expert, slot, issued, is_valid = (
            job_ref[field] for field in (LAYER, EXPERT, SLOT, ISSUED, VALID)
        )
        for live_ref in live_refs:
            is_valid = is_valid * live_ref[0]
        last_row = slots_ref.shape[1]
        tile_rows = min(_NARROW_ROWS if is_narrow else _ROWS, last_row)
        begin = (event - issued - 1) * schedule.rows_per_event + num_rows_before
        end = jnp.clip(begin + num_rows, 0, last_row)
        begin = jnp.clip(begin, 0, last_row)
        num_tiles = jax.lax.div(end - begin + (tile_rows - 1), tile_rows)
        num_turns = jax.lax.div(num_tiles - program + (num_programs - 1), num_programs)

        def copy_from(host_ref):
            def copy(turn, carry):
                # The last tile may reach beyond its share: those rows are copied again.
                first = begin + (program + turn * num_programs) * tile_rows
                first = jnp.minimum(first, last_row - tile_rows)
                for offset, length in pieces(slots_ref.shape[2]):
                    at = (pl.ds(first, tile_rows), pl.ds(offset, length))
                    slots_ref[(slot, *at)] = host_ref[(expert, *at)]
                return carry

            jax.lax.fori_loop(0, num_turns, copy, 0)

        @pl.when(is_valid > 0)
        def _():
            num_ahead = jax.lax.rem(target - layer_number + num_layers, num_layers)
            jax.lax.switch(num_ahead, [lambda ref=ref: copy_from(ref) for ref in host_refs])

    inputs = (layer, prefetch.job, prefetch.step, *conditions, *prefetch.hosts)
    return Part(num_programs, body, inputs)
