"""Cells of any machine and cache size, simulated on the draws of a grid."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moejax.bench._grid import (
    GridSettings,
    Progress,
    make_clock,
    make_lane,
    simulate_lanes,
    summarise,
    without_unread,
)
from moejax.bench.audit import by_run
from moejax.cards import Hardware, ModelSpec
from moejax.strategies import Strategy
from moejax.trace import Trace


@dataclass(frozen=True)
class Wanted:
    """One cell to simulate with every strategy.

    Attributes:
      hardware: Its clock.
      batch_size: Requests that decode in lockstep.
      slots: Device slots of each layer.
      head: What tells its records from others besides strategy, batch size and slots.
      most_runs: Only so many of the draws; None takes all.
    """

    hardware: Hardware
    batch_size: int
    slots: tuple[int, ...]
    head: Mapping[str, Any] = field(default_factory=dict)
    most_runs: int | None = None


def simulate_cells(
    strategies: Mapping[str, Strategy],
    wanted: Sequence[Wanted],
    model: ModelSpec,
    draws: Sequence[Trace],
    settings: GridSettings,
    *,
    what: str,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Simulates every wanted cell with every strategy; lanes of one strategy share a program.

    Args:
      strategies: By the name that goes into the records.
      wanted: Cells; their batch sizes are at most what the draws have requests for.
      model: Card of the model.
      draws: Requests, one trace a run.
      settings: Steps, context and seed; its strategies say whether the future is prepared.
      what: Name of the experiment, for `progress`.
      progress: Told before each strategy.

    Returns:
      One cell a strategy and wanted cell, in that order: its head, and its fields as lists over
      runs.
    """
    sizes = dict.fromkeys(one.batch_size for one in wanted)
    routed = {size: [make_lane(d, size, "batched", settings) for d in draws] for size in sizes}
    points = [(one, run) for one in wanted for run in range(len(draws))[: one.most_runs]]
    clocks = [
        make_clock(one.hardware, model, draws[0], one.batch_size, "batched", settings)
        for one, _ in points
    ]
    cells = []
    for index, (name, strategy) in enumerate(strategies.items()):
        if progress is not None:
            progress(index, len(strategies), f"{what}: {name}")
        records = simulate_lanes(
            strategy,
            [without_unread(routed[one.batch_size][run], strategy) for one, run in points],
            clocks,
            np.asarray([one.slots for one, _ in points], np.int32),
            seeds=[settings.seed + run for _, run in points],
            topk=draws[0].topk,
        )
        simulated = iter(zip(records, clocks, strict=True))
        for one in wanted:
            here = replace(settings, slots=one.slots)
            runs = [
                summarise(record, clock, here, batch_size=one.batch_size, dispatch="batched")
                for record, clock in itertools.islice(simulated, len(draws[: one.most_runs]))
            ]
            head = {"strategy": name, "batch_size": one.batch_size, "slots": max(one.slots)}
            cells.append(head | dict(one.head) | by_run(runs))
    return cells


def ends(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """The smallest and the largest batch size, once where they are one."""
    return tuple(dict.fromkeys((min(batch_sizes), max(batch_sizes))))


def told(settings: GridSettings) -> dict[str, Any]:
    """How cells were drawn and counted, for `results.json`."""
    fields = ("num_runs", "num_steps", "num_warmup_steps", "context_tokens", "seed")
    return {name: getattr(settings, name) for name in fields}
