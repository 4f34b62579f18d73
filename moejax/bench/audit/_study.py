"""The study's own experiment: its geometry, its one-after-another requests, its cache sizes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.bench._grid import (
    GridSettings,
    Progress,
    draw_runs,
    make_clock,
    make_lane,
    simulate_lanes,
    summarise,
    total_steps,
    without_unread,
)
from moejax.bench._requests import Requests
from moejax.cards import Hardware, ModelSpec
from moejax.claims import STRATEGIES_OF_STUDY
from moejax.cost import LayerClock
from moejax.simulate import Record, Replay
from moejax.strategies import STRATEGIES, Profile, Strategy
from moejax.trace import Trace

STUDY_MODEL = "reference-study"
STUDY_WORKLOAD = "reference-study"
STUDY_HARDWARE = "rtx-3090"
BASELINE = "lru"
"""No strategy of the study, so it has no claims; runs batched only, to compare with."""

_BATCH_SIZES = (1, 2, 4, 8, 16)
_CURVE_RATIOS = (1 / 16, 1 / 4, 3 / 4)
"""Of a layer's experts: more cache sizes, so that a curve can be drawn."""

_LATENCIES = {"latency_s": "mean", "p50_s": "p50", "p95_s": "p95", "p99_s": "p99"}
_FIELDS = (
    *("hit_ratio", "late_ratio", "compute_s", "stall_s", "fetched_bytes", "memory_bytes"),
    *("capacity_bytes", "num_prefetches"),
)


@dataclasses.dataclass(frozen=True)
class StudySlots:
    """Slots of a layer, under the readings that the study's figures allow.

    Attributes:
      stated: Its K: every layer keeps this many.
      in_bytes: What the largest memory that it states holds, shared by all layers.
      in_tiers: The slots of its three tiers, shared by all layers.
    """

    stated: int
    in_bytes: int
    in_tiers: int


def slots_of_study(claims: Mapping[str, Any], model: ModelSpec) -> StudySlots:
    """The readings for a model of the study's geometry."""
    memory_mb = max(row[0] for name, row in claims["memory"].items() if name != "columns")
    num_cached = int(memory_mb * 1e6) // model.expert_bytes
    return StudySlots(
        stated=claims["cache_slots"]["l1"],
        in_bytes=num_cached // model.num_moe_layers,
        in_tiers=sum(claims["cache_slots"].values()) // model.num_moe_layers,
    )


def study_settings(
    slots: StudySlots, model: ModelSpec, *, num_runs: int, seed: int
) -> GridSettings:
    """The study's grid, with steps enough for its intervals."""
    return GridSettings(
        strategies=(*STRATEGIES_OF_STUDY, BASELINE),
        batch_sizes=_BATCH_SIZES,
        num_runs=num_runs,
        slots=(slots.stated,) * model.num_moe_layers,
        dispatches=("sequential", "batched"),
        num_steps=40,
        num_warmup_steps=8,
        seed=seed,
    )


def run_study(
    settings: GridSettings,
    slots: StudySlots,
    model: ModelSpec,
    hardware: Hardware,
    requests: Requests,
    profile: Profile,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Runs every strategy at every batch size and dispatch, and at batch 1 with other caches.

    The requests of a sequential batch of B are the first B of the longest one, so that one replay
    answers for all batch sizes.

    Returns:
      One cell a strategy, dispatch, batch size and number of slots: the values of its runs.
    """
    places, num_steps = max(settings.batch_sizes), total_steps(settings)
    draws = draw_runs(requests, settings)
    sequential = _Points.make(settings, model, hardware, draws, "sequential", [(places, None)])
    others = sorted(_slot_choices(slots, model) - {slots.stated})
    wanted = [(size, None) for size in settings.batch_sizes] + [(1, other) for other in others]
    batched = _Points.make(settings, model, hardware, draws, "batched", wanted)
    cells = []
    for index, name in enumerate(settings.strategies):
        if progress is not None:
            progress(index, len(settings.strategies), f"audit: {name}")
        strategy = STRATEGIES[name].make(profile)
        if name != BASELINE:
            records = sequential.simulate(strategy, settings, draws[0].topk)
            for size in settings.batch_sizes:
                cut = [_first_steps(record, size * num_steps) for record in records]
                clocks = sequential.clocks
                cells.append(_cell(name, size, "sequential", settings, cut, clocks))
        records = batched.simulate(strategy, settings, draws[0].topk)
        if name == BASELINE:
            # One request at a time is the same in both dispatches.
            alone = batched.clocks[: len(draws)]
            cells.append(_cell(name, 1, "sequential", settings, records[: len(draws)], alone))
        for number, (size, other) in enumerate(wanted):
            chosen = slice(number * len(draws), (number + 1) * len(draws))
            here = _with_slots(settings, other)
            cells.append(
                _cell(name, size, "batched", here, records[chosen], batched.clocks[chosen])
            )
    return cells


@dataclasses.dataclass(frozen=True)
class _Points:
    """Lanes of one length: every wanted (batch size, slots) times every draw."""

    lanes: list[Replay]
    clocks: list[LayerClock]
    capacities: np.ndarray
    seeds: list[int]

    @staticmethod
    def make(
        settings: GridSettings,
        model: ModelSpec,
        hardware: Hardware,
        draws: Sequence[Trace],
        dispatch: str,
        wanted: Sequence[tuple[int, int | None]],
    ) -> "_Points":
        """`slots` None means those of the settings."""
        lanes: dict[int, list[Replay]] = {}
        clocks: dict[int, LayerClock] = {}
        for size in dict.fromkeys(size for size, _ in wanted):
            lanes[size] = [make_lane(draw, size, dispatch, settings) for draw in draws]
            clocks[size] = make_clock(hardware, model, draws[0], size, dispatch, settings)
        return _Points(
            [lane for size, _ in wanted for lane in lanes[size]],
            [clocks[size] for size, _ in wanted for _ in draws],
            np.asarray(
                [_with_slots(settings, slots).slots for _, slots in wanted for _ in draws],
                np.int32,
            ),
            [settings.seed + run for _ in wanted for run in range(len(draws))],
        )

    def simulate(self, strategy: Strategy, settings: GridSettings, topk: int) -> list[Record]:
        """One record a lane."""
        return simulate_lanes(
            strategy,
            [without_unread(lane, strategy) for lane in self.lanes],
            self.clocks,
            self.capacities,
            seeds=self.seeds,
            topk=topk,
        )


def _slot_choices(slots: StudySlots, model: ModelSpec) -> set[int]:
    return {
        *dataclasses.astuple(slots),
        *(round(ratio * model.num_experts) for ratio in _CURVE_RATIOS),
    }


def _with_slots(settings: GridSettings, slots: int | None) -> GridSettings:
    if slots is None:
        return settings
    return dataclasses.replace(settings, slots=(slots,) * len(settings.slots))


def _first_steps(record: Record, num_steps: int) -> Record:
    return jax.tree.map(lambda leaf: leaf[:num_steps], record)


def _cell(
    strategy: str,
    batch_size: int,
    dispatch: str,
    settings: GridSettings,
    records: Sequence[Record],
    clocks: Sequence[LayerClock],
) -> dict[str, Any]:
    runs = [
        summarise(record, clock, settings, batch_size=batch_size, dispatch=dispatch)
        for record, clock in zip(records, clocks, strict=True)
    ]
    return {
        "strategy": strategy,
        "batch_size": batch_size,
        "dispatch": dispatch,
        "slots": max(settings.slots),
        **by_run(runs),
    }


def by_run(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Records of one point of a grid as lists over its runs; prefetches are those of a step."""
    columns = {
        name: [record["latency_s"][key] for record in records] for name, key in _LATENCIES.items()
    }
    columns |= {name: [record[name] for record in records] for name in _FIELDS}
    steps = [record["num_steps"] for record in records]
    columns["num_prefetches"] = [
        number / num_steps
        for number, num_steps in zip(columns["num_prefetches"], steps, strict=True)
    ]
    return columns
