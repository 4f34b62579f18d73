"""An engine whose experts several devices share: what they counted, what bounds them."""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt

from moejax.devices import Team
from moejax.engine import COUNTS, OffloadEngine, OffloadState, _offload_kernels, _offload_xla
from moejax.engine.kernels._active import EXPERT
from moejax.engine.kernels._experts import Answered, experts_down
from moejax.offload import SlotPlan
from moejax.results import Measurement
from moejax.strategies import Strategy
from moejax.trace import Trace, share_of

from ._engine_counts import first_difference, simulated_counts
from ._engine_rig import Rig, StepSizes
from ._engine_steps import Routing, Steps, replay_table, with_tokens

_NUM_SAMPLES = 9
_LINKED = (24, 240)
"""All-reduces in a chain."""


class Links(NamedTuple):
    """Rates of the devices' links and of what joins the devices.

    Attributes:
      alone_bytes_per_s: One device copies from the host, the others idle.
      beside_bytes_per_s: Each of them, while all copy.
      all_reduces: What adding up the devices' answers takes, a record a size: `num_devices`,
        `all_reduce_bytes` of the float32 vector, and `all_reduce_s` of one in a chain within a
        program, rounding and the residual stream included.
      samples: Calls that copy.
    """

    alone_bytes_per_s: float
    beside_bytes_per_s: float
    all_reduces: list[dict[str, Any]]
    samples: dict[str, Measurement]


def measure_links(layer: Array, team: Team, *, hidden: int, batch_sizes: Sequence[int]) -> Links:
    """Measures copies of a layer of the store, and all-reduces.

    Args:
      layer: Packed experts of one layer, each device's own in host memory.
      team: Several devices.
      hidden: Width of the residual stream.
      batch_sizes: Requests; the kernels pad several to 16.
    """
    first = layer.addressable_shards[0].data
    copies = {
        "alone": _sample(partial(_send, first)),
        "beside": _sample(partial(_send, layer)),
    }
    shapes = [(hidden, columns) for columns in sorted({_num_columns(n) for n in batch_sizes})]
    return Links(
        alone_bytes_per_s=first.nbytes / float(np.median(copies["alone"].samples)),
        beside_bytes_per_s=first.nbytes / float(np.median(copies["beside"].samples)),
        all_reduces=[_all_reduce(team, shape, layer.dtype) for shape in shapes],
        samples=copies,
    )


def _all_reduce(team: Team, shape: tuple[int, int], dtype: jnp.dtype) -> dict[str, Any]:
    """One all-reduce of a layer: two lengths of a chain tell it from the call around it."""
    x = team.place(jnp.ones(shape, dtype), Team.ALIKE)
    few, many = (_sample(partial(_chain(team, number), x)).samples for number in _LINKED)
    base_s, added = float(np.median(few)), _LINKED[1] - _LINKED[0]
    each_s = tuple((sample_s - base_s) / added for sample_s in many)
    return {
        "num_devices": team.num_devices,
        "all_reduce_bytes": x.size * np.dtype(np.float32).itemsize,
        "all_reduce_s": Measurement("all_reduce", "s", each_s),
    }


def devices_record(
    steps: Steps,
    sizes: StepSizes,
    *,
    num_devices: int,
    batch_size: int,
    mean_context: float,
    num_warmup: int,
    link_bytes_per_s: float,
    hbm_bytes_per_s: float,
) -> dict[str, Any]:
    """The record of a case: what was measured after the warm-up, and its bounds.

    A layer waits for its slowest device, so `bound_sum_s` adds up, layer by layer, what the
    slowest needs for its fetched and its resident experts, and what every device reads in a step.
    """
    counts = by_device(steps.counts, num_devices)[num_warmup:].astype(np.float64)
    hits, misses, rows = (counts[..., COUNTS.index(n)] for n in ("hits", "misses", "fetched_rows"))
    link_s = rows * sizes.row_bytes / link_bytes_per_s
    read_s = hits * sizes.expert_bytes / hbm_bytes_per_s
    alike_bytes = sizes.dense_bytes + batch_size * mean_context * sizes.position_bytes
    bound_s = float((link_s + read_s).max(1).sum(1).mean()) + alike_bytes / hbm_bytes_per_s
    step_s = steps.step_s[num_warmup:]
    median_s = float(np.median(step_s))
    demands = counts[..., COUNTS.index("demands")].sum()
    return {
        "num_devices": num_devices,
        "batch_size": batch_size,
        "mean_context": mean_context,
        "hit_ratio": float(hits.sum() / demands) if demands else 0.0,
        "misses_per_step": misses.sum(2).mean(0).tolist(),
        "slowest_misses_per_step": float(misses.max(1).sum(1).mean()),
        "layer_misses": misses.mean(0).tolist(),
        "fetched_bytes_per_step": float(rows.sum((1, 2)).mean()) * sizes.row_bytes,
        "step_s": {
            "median": median_s,
            "p95": float(np.percentile(step_s, 95)),
            "samples": list(step_s),
        },
        "num_warmup_steps": num_warmup,
        "bound_sum_s": bound_s,
        "bound_sum_ratio": median_s / bound_s,
    }


def by_device(
    counts: Int32[np.ndarray, "steps device_layers counts"], num_devices: int
) -> Int32[np.ndarray, "steps devices layers counts"]:
    """What each device counted; an engine gives their layers one device behind another."""
    return counts.reshape(len(counts), num_devices, -1, counts.shape[-1])


def shares_difference(
    rig: Rig,
    plan: SlotPlan,
    strategy: Strategy,
    experts: UInt[np.ndarray, "steps layers places_topk"],
    counts: Int32[np.ndarray, "steps device_layers counts"],
    batch_size: int,
) -> str | None:
    """Where a device's counts part from the simulator's on its share; None where none does."""
    num_devices = rig.store.team.num_devices
    for device, found in enumerate(by_device(counts, num_devices).swapaxes(0, 1)):
        own, num_experts = _share(experts, rig.config.num_experts, batch_size, device, num_devices)
        simulated = simulated_counts(
            strategy,
            plan,
            own,
            num_experts=num_experts,
            topk=rig.config.num_experts_per_tok,
            num_rows=rig.store.layout.num_rows,
        )
        difference = first_difference(found, simulated)
        if difference is not None:
            return f"device {device}, {difference}"
    return None


def _share(
    experts: UInt[np.ndarray, "steps layers places_topk"],
    num_experts: int,
    batch_size: int,
    device: int,
    num_devices: int,
) -> tuple[UInt[np.ndarray, "steps layers places_own"], int]:
    steps, layers, _ = experts.shape
    by_place = experts.reshape(steps, layers, batch_size, -1).swapaxes(1, 2)
    tokens = by_place.reshape(steps * batch_size, layers, -1)
    start = np.array([0, len(tokens)], np.int64)
    share = share_of(Trace(tokens, num_experts, start), device, num_devices)
    own = share.experts.reshape(steps, batch_size, layers, -1).swapaxes(1, 2)
    return own.reshape(steps, layers, -1), share.num_experts


def logits_of(
    engine: OffloadEngine, routing: Routing, batch_size: int, num_steps: int, *, seed: int
) -> Float[np.ndarray, "steps batch vocab"]:
    """What an engine says to drawn tokens on replayed routing: no choice of its own carries on."""
    table = replay_table(engine, routing, batch_size)
    program = engine.program(batch_size, num_steps, is_replayed=True)
    state: OffloadState = engine.new_state(batch_size, num_steps)
    logits = []
    for token_ids in _tokens(engine, batch_size, num_steps, seed):
        state, output = program(with_tokens(state, token_ids), None, table)
        logits.append(np.asarray(output.logits))
    return np.stack(logits)


@contextmanager
def adding_in_order(num_devices: int) -> Iterator[None]:
    """Lets one device add the experts up as several would: each device's own, then the sums.

    Only for engines of one device whose programs are compiled meanwhile, with a strategy that no
    other engine had. Such an engine says to the bit what an engine on so many devices says.
    """
    from unittest import mock

    def add_up(answers: Array, ids: Array) -> Array:
        is_own = [(ids % num_devices == device)[:, None, None] for device in range(num_devices)]
        return functools.reduce(jnp.add, [jnp.where(own, answers, 0.0).sum(0) for own in is_own])

    def add_experts(_, active, y, inner, host, slots, how) -> Answered:
        sums = []
        for device in range(num_devices):
            is_own = active.table[EXPERT] % num_devices == device
            own = active._replace(weights=jnp.where(is_own[:, None], active.weights, 0.0))
            answer, slots, _ = experts_down(
                own, jnp.zeros_like(y), inner, host, slots, how, dtype=jnp.float32
            )
            sums.append(answer)
        return _offload_kernels.end_layer(y, functools.reduce(jnp.add, sums), slots, inner.dtype)

    with (
        mock.patch.object(_offload_xla, "add_up", add_up),
        mock.patch.object(_offload_kernels, "add_experts", add_experts),
    ):
        yield


def _tokens(
    engine: OffloadEngine, batch_size: int, num_steps: int, seed: int
) -> Iterator[Int32[np.ndarray, " batch"]]:
    generator = np.random.default_rng(seed)
    for _ in range(num_steps):
        yield generator.integers(0, engine.config.vocab_size, batch_size, np.int32)


def _num_columns(batch_size: int) -> int:
    """Columns of activations: several requests are padded to 16 by the kernels."""
    return 1 if batch_size == 1 else 16


def _chain(team: Team, number: int):
    def chain(x: Array) -> Array:
        y = jnp.zeros(x.shape, jnp.float32)
        for _ in range(number):
            x = (y + jax.lax.psum(0.5 * x.astype(jnp.float32), Team.AXIS)).astype(x.dtype)
        return x

    return jax.jit(team.run(chain, Team.ALIKE, Team.ALIKE))


def _send(source: Array) -> Array:
    return jax.device_put(source, source.sharding.with_memory_kind("device"))


def _sample(call: Any) -> Measurement:
    jax.block_until_ready(call())
    samples = []
    for _ in range(_NUM_SAMPLES):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - begin)
    return Measurement("call", "s", tuple(samples))
