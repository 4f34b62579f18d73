"""One case of an engine measured: its steps, what they moved, and what bounds them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from moejax.engine import COUNTS, OffloadEngine
from moejax.offload import Scope
from moejax.strategies import Strategy

from ._engine_ceilings import Ceilings
from ._engine_check import Transcript, count_difference, is_identical, transcript
from ._engine_rig import Rig, StepSizes
from ._engine_steps import Routing, Steps, generate_steps, record_routing, replay_steps


class EngineCase(NamedTuple):
    """What distinguishes one record from the others.

    Attributes:
      strategy: Name in the registry.
      slots: Slots of a layer; a pool has as many in all.
      scope: `layer` or `pool`.
      batch_size: Requests that decode in lockstep.
      routing: `router` for the model's own, else the name of what is replayed.
    """

    strategy: str
    slots: int
    scope: Scope
    batch_size: int
    routing: str

    def label(self) -> str:
        """A few words for the person who waits."""
        return (
            f"{self.strategy}, {self.slots} slots ({self.scope}), batch {self.batch_size}, "
            f"{self.routing}"
        )


ROUTER = "router"
"""Name of the model's own routing."""


class Timed(NamedTuple):
    """Steps of a case and the mean number of tokens behind each request meanwhile."""

    steps: Steps
    mean_context: float


def time_replay(
    engine: OffloadEngine, routing: Routing, batch_size: int, *, context: int, num_warmup: int
) -> Timed:
    """Replays routing from empty slots, every request at the same context."""
    steps = replay_steps(engine, routing, batch_size, context=context)
    return Timed(steps, context + (num_warmup + len(steps.step_s)) / 2)


def time_generation(
    engine: OffloadEngine, prompts: Sequence[Sequence[int]], num_steps: int, *, num_warmup: int
) -> Timed:
    """Continues prompts by the model's own router."""
    steps = generate_steps(engine, prompts, num_steps)
    length = float(np.mean([len(prompt) for prompt in prompts]))
    return Timed(steps, length + (num_warmup + num_steps) / 2)


def case_record(
    case: EngineCase,
    timed: Timed,
    sizes: StepSizes,
    ceilings: Ceilings,
    *,
    num_warmup: int,
) -> dict[str, Any]:
    """The record of a case: what was measured after the warm-up, and its bounds.

    `device_bytes_per_step` counts what a step cannot but read from device memory: the dense
    weights once, keys and values of the context, and each hit expert once. Experts that are
    fetched count at the link alone, though they are written through into their slots.
    `demanded_bytes_per_step` are those of all experts that a step computes with.
    """
    step_s = timed.steps.step_s[num_warmup:]
    columns = count_columns(timed.steps.counts[num_warmup:])
    means = {name: float(values.mean()) for name, values in columns.items()}
    fetched_bytes = means["fetched_rows"] * sizes.row_bytes
    device_bytes = (
        sizes.dense_bytes
        + case.batch_size * timed.mean_context * sizes.position_bytes
        + means["hits"] * sizes.expert_bytes
    )
    link_s = fetched_bytes / ceilings.link_bytes_per_s
    device_s = device_bytes / ceilings.hbm_bytes_per_s
    median_s = float(np.median(step_s))
    return {
        "strategy": case.strategy,
        "slots": case.slots,
        "scope": case.scope,
        "batch_size": case.batch_size,
        "replayed": case.routing != ROUTER,
        "routing": case.routing,
        "hit_ratio": means["hits"] / means["demands"] if means["demands"] else 0.0,
        "demands_per_step": means["demands"],
        "misses_per_step": means["misses"],
        "late_per_step": means["late"],
        "prefetches_per_step": means["prefetches"],
        "fetched_bytes_per_step": fetched_bytes,
        "demanded_bytes_per_step": means["demands"] * sizes.expert_bytes,
        "device_bytes_per_step": device_bytes,
        "mean_context": timed.mean_context,
        "step_s": {
            "median": median_s,
            "p95": float(np.percentile(step_s, 95)),
            "samples": list(step_s),
        },
        "num_warmup_steps": num_warmup,
        "link_bytes_per_s": ceilings.link_bytes_per_s,
        "hbm_bytes_per_s": ceilings.hbm_bytes_per_s,
        "bound_sum_s": link_s + device_s,
        "bound_max_s": max(link_s, device_s),
        "bound_sum_ratio": median_s / (link_s + device_s),
        "steps": {
            "hits": columns["hits"],
            "late": columns["late"],
            "misses": columns["misses"],
            "fetched_bytes": columns["fetched_rows"] * sizes.row_bytes,
        },
        "bit_identical": None,
        "simulator_counts_equal": None,
    }


def count_columns(counts: Int32[np.ndarray, "steps layers counts"]) -> dict[str, np.ndarray]:
    """Sums over the layers of each step, by name."""
    sums = counts.sum(axis=1, dtype=np.int64)
    return {name: sums[:, number] for number, name in enumerate(COUNTS)}


def check_counts(
    rig: Rig,
    engine: OffloadEngine,
    strategy: Strategy,
    batch_size: int,
    *,
    replayed: tuple[Routing, Steps] | None = None,
    prompts: Sequence[Sequence[int]] = (),
    num_steps: int = 0,
) -> dict[str, Any]:
    """Compares every event's counts with the simulator's.

    Args:
      rig: The model.
      engine: The engine.
      strategy: Its strategy.
      batch_size: Requests.
      replayed: What was replayed from empty slots and counted then; None records the routing of
        a generation first, and replays that.
      prompts: Where that generation begins.
      num_steps: How long it goes on.

    Returns:
      `simulator_counts_equal` and, if they are not, where: `count_difference`.
    """
    if replayed is None:
        routing, counts = record_routing(engine, prompts, num_steps), None
    else:
        routing, counts = replayed[0], replayed[1].counts
    found = count_difference(rig, engine, strategy, routing, counts, batch_size=batch_size)
    return {"simulator_counts_equal": found is None} | (
        {} if found is None else {"count_difference": found}
    )


def check_bits(
    engine: OffloadEngine,
    resident: Transcript,
    batch_size: int,
    num_steps: int,
    *,
    seed: int,
    routing: Routing | None = None,
) -> dict[str, Any]:
    """Compares tokens and logits with those of the engine that holds every expert.

    Returns:
      `bit_identical`, over how many steps, and how many misses there were meanwhile.
    """
    ours = transcript(engine, batch_size, num_steps, seed=seed, routing=routing)
    return {
        "bit_identical": is_identical(ours, resident),
        "num_identity_steps": num_steps,
        "num_identity_misses": ours.num_misses,
    }
