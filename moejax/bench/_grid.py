"""The experiment: strategies x batch sizes x runs on the timeline."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from moejax.bench._requests import Requests, batch_lookahead, draw_run
from moejax.cards import Hardware, ModelSpec
from moejax.cost import LayerClock, layer_clock
from moejax.simulate import (
    TIMELINE_OPTIONS,
    Record,
    Replay,
    apart,
    replay,
    spread_over,
    step_means,
    timeline,
)
from moejax.strategies import STRATEGIES, Profile, Strategy, within_reach
from moejax.trace import Trace, batch_trace

MAX_LANES = 64
"""Lanes that one device simulates side by side."""
# A timeline is a chain of small programs that keeps one core busy; what another thread hands over
# runs beside it.
_NUM_THREADS = 2

Progress = Callable[[int, int, str], None]
Simulation = Callable[[], list[Record]]


@dataclass(frozen=True)
class GridSettings:
    """What the experiment varies and what it holds fixed.

    Attributes:
      strategies: Names in the registry.
      batch_sizes: Requests that decode in lockstep.
      num_runs: Draws of requests and strategy seed.
      slots: Device slots of each layer, the same for every strategy.
      dispatches: `batched`, `sequential` or both.
      num_steps: Decode steps that count.
      num_warmup_steps: Steps before them, which fill the cache and do not count.
      context_tokens: Tokens in each request's KV cache, for the cost of attention.
      seed: Seed of everything drawn.
    """

    strategies: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    num_runs: int
    slots: tuple[int, ...]
    dispatches: tuple[str, ...] = ("batched",)
    num_steps: int = 128
    num_warmup_steps: int = 32
    context_tokens: int = 512
    seed: int = 0


def run_grid(
    settings: GridSettings,
    model: ModelSpec,
    hardware: Hardware,
    requests: Requests,
    profile: Profile,
    *,
    num_devices: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Runs every point of the grid: one record a strategy, batch size, run and dispatch.

    A run is another draw of requests and another strategy seed; nothing else varies between
    runs, and no noise is added. All strategies see the same requests. The numbers do not depend
    on `num_devices`, over which runs and batch sizes are spread.

    Returns:
      Records in the order strategy, batch size, run, batched before sequential.
    """
    records: dict[tuple, dict[str, Any]] = {}
    # Lanes of one length go together: all batch sizes when batched, each by itself in sequence.
    groups = [("batched", settings.batch_sizes)] if "batched" in settings.dispatches else []
    if "sequential" in settings.dispatches:
        groups += [("sequential", (size,)) for size in settings.batch_sizes]
    num_done, num_all = 0, len(settings.strategies) * len(groups)
    draws = draw_runs(requests, settings)
    if progress is not None:
        progress(num_done, num_all, "requests")
    for dispatch, sizes in groups:
        points = [(size, run) for size in sizes for run in range(settings.num_runs)]
        lanes = [make_lane(draws[run], size, dispatch, settings) for size, run in points]
        clock_of = {
            size: make_clock(hardware, model, draws[0], size, dispatch, settings) for size in sizes
        }

        prepare = functools.partial(
            _prepare,
            profile=profile,
            lanes=lanes,
            clocks=[clock_of[size] for size, _ in points],
            capacities=np.asarray([settings.slots] * len(points), np.int32),
            seeds=[settings.seed + run for _, run in points],
            topk=draws[0].topk,
            num_devices=num_devices,
        )
        for name, simulate in _one_ahead(prepare, settings.strategies):
            for (size, run), result in zip(points, simulate(), strict=True):
                record = summarise(
                    result, clock_of[size], settings, batch_size=size, dispatch=dispatch
                )
                head = {"strategy": name, "batch_size": size, "run": run, "dispatch": dispatch}
                records[name, size, run, dispatch] = head | record
            num_done += 1
            if progress is not None:
                progress(num_done, num_all, f"{name}, {dispatch}")
    return [
        records[name, size, run, dispatch]
        for name in settings.strategies
        for size in settings.batch_sizes
        for run in range(settings.num_runs)
        for dispatch in settings.dispatches
    ]


def _prepare(name: str, *, profile: Profile, lanes: Sequence[Replay], **points: Any) -> Simulation:
    strategy = STRATEGIES[name].make(profile)
    return prepare_lanes(strategy, [without_unread(lane, strategy) for lane in lanes], **points)


def _one_ahead(
    prepare: Callable[[str], Simulation], names: Sequence[str]
) -> Iterator[tuple[str, Simulation]]:
    """What is prepared of each name, while the next one is being prepared."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(prepare, names[0])
        for name, following in zip(names, [*names[1:], None], strict=True):
            ready = coming.result()
            if following is not None:
                coming = pool.submit(prepare, following)
            yield name, ready


def draw_runs(requests: Requests, settings: GridSettings) -> list[Trace]:
    """The requests of every run, enough for its largest batch."""
    draw = functools.partial(
        draw_run,
        requests,
        num_places=max(settings.batch_sizes),
        num_steps=total_steps(settings),
        with_lookahead=any(STRATEGIES[name].needs_lookahead for name in settings.strategies),
    )
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(draw, range(settings.num_runs)))


def simulate_lanes(
    strategy: Strategy,
    lanes: Sequence[Replay],
    clocks: Sequence[LayerClock],
    capacities: Int[np.ndarray, "lanes layers"],
    *,
    seeds: Sequence[int],
    topk: int,
    depths: Sequence[int] | None = None,
    num_devices: int = 1,
) -> list[Record]:
    """Replays many lanes of equal length on the timeline, compiled once.

    Takes what `prepare_lanes` takes.

    Returns:
      One record a lane, as numpy arrays.

    Raises:
      UsageError: There are not so many devices.
    """
    return prepare_lanes(
        strategy,
        lanes,
        clocks,
        capacities,
        seeds=seeds,
        topk=topk,
        depths=depths,
        num_devices=num_devices,
    )()


def prepare_lanes(
    strategy: Strategy,
    lanes: Sequence[Replay],
    clocks: Sequence[LayerClock],
    capacities: Int[np.ndarray, "lanes layers"],
    *,
    seeds: Sequence[int],
    topk: int,
    depths: Sequence[int] | None = None,
    num_devices: int = 1,
) -> Simulation:
    """Compiles what replays many lanes of equal length on the timeline.

    Args:
      strategy: What scores.
      lanes: Routing of each lane.
      clocks: Times of each lane.
      capacities: Slots of each lane and layer.
      seeds: Seed of the strategy in each lane.
      topk: Experts one token demands.
      depths: How many layers ahead a prefetch may aim in each lane; None sets no limit.
      num_devices: Devices that share the lanes; no number depends on it.

    Returns:
      A function that replays them: one record a lane, as numpy arrays.

    Raises:
      UsageError: There are not so many devices.
    """
    spread = spread_over(num_devices)
    width = min(MAX_LANES * num_devices, -(-len(lanes) // _NUM_THREADS))
    width += -width % num_devices

    def arguments(start: int):
        # The last group repeats its last lane, so that every group has one compiled shape.
        chosen = [min(start + i, len(lanes) - 1) for i in range(width)]
        batch = _stack([lanes[i] for i in chosen])
        clock = _stack([clocks[i] for i in chosen])
        keys = jax.vmap(jax.random.key)(jnp.asarray([seeds[i] for i in chosen], jnp.uint32))
        depth = np.asarray([0 if depths is None else depths[i] for i in chosen], np.int32)
        return spread((batch, clock, capacities[chosen], keys, depth))

    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        arguments(0),
    )
    compiled = _compile_lanes(strategy, topk, depths is not None, shapes, num_devices)

    def group(start: int) -> list[Record]:
        record = jax.device_get(compiled(*arguments(start)))
        here = min(width, len(lanes) - start)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], record) for i in range(here)]

    def simulate() -> list[Record]:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            groups = pool.map(group, range(0, len(lanes), width))
            return [record for records in groups for record in records]

    return simulate


@functools.lru_cache(maxsize=32)
def _compile_lanes(
    strategy: Strategy, topk: int, limits_depth: bool, shapes: tuple, num_devices: int
):
    """The program of lanes of such shapes; the same strategy object is compiled once."""

    @jax.jit
    @functools.partial(apart, num_devices)
    @jax.vmap
    def run(lane, clock, capacity, key, depth):
        limited = within_reach(strategy, depth) if limits_depth else strategy
        return timeline(limited, lane, clock, capacity, key, topk=topk)

    return run.lower(*shapes).compile(dict(TIMELINE_OPTIONS))


def summarise(
    record: Record,
    clock: LayerClock,
    settings: GridSettings,
    *,
    batch_size: int,
    dispatch: str,
) -> dict[str, Any]:
    """The figures of one run: of all steps, or means a step where a field says no more."""
    size = np.asarray(clock.expert_bytes, np.float64)
    places = batch_size if dispatch == "sequential" else 1
    # Sequential lanes play one place after another; a batch's step is the sum over its places.
    counted = jax.tree.map(
        lambda leaf: _counted_steps(np.asarray(leaf, np.float64), places, settings), record
    )
    latency_s = (counted.compute_s + counted.stall_s).sum(-1)
    # A layer's misses arrive beside the residents before retention decides who stays.
    occupied = np.asarray(record.num_resident, np.float64) @ size
    staged = ((np.asarray(record.num_misses) - np.asarray(record.num_on_host)) * size).max()
    return {
        "slots": max(settings.slots),
        "capacity_bytes": int(np.asarray(settings.slots) @ size),
        "num_steps": settings.num_steps,
        "num_demands": int(counted.num_demands.sum()),
        "num_hits": int(counted.num_hits.sum()),
        "num_late": int(counted.num_late.sum()),
        "num_misses": int(counted.num_misses.sum()),
        "num_prefetches": int(counted.num_prefetches.sum()),
        "num_useful_prefetches": int(counted.num_useful.sum()),
        "latency_s": {
            "mean": float(latency_s.mean()),
            "std": float(latency_s.std()),
            **{f"p{q}": float(np.percentile(latency_s, q)) for q in (50, 95, 99)},
        },
        **step_means(counted, clock),
        "memory_bytes": int(occupied.max() + staged),
    }


def total_steps(settings: GridSettings) -> int:
    """Steps that are simulated, counted or not."""
    return settings.num_steps + settings.num_warmup_steps


def make_lane(trace: Trace, batch_size: int, dispatch: str, settings: GridSettings) -> Replay:
    """The routing of one point of the grid; sequential ones play place after place."""
    num_steps = total_steps(settings)
    experts = batch_trace(trace, batch_size, num_steps=num_steps)
    said = batch_lookahead(trace, batch_size, num_steps)
    if dispatch == "sequential":
        experts = _one_place_after_another(experts, batch_size)
        if said is not None:
            # [steps, layers, ahead, places, width], one place of each step at a time.
            said = np.concatenate([said[..., [place], :] for place in range(batch_size)])
    with_future = any(STRATEGIES[name].needs_future for name in settings.strategies)
    return replay(experts, trace.num_experts, with_future=with_future, lookahead=said)


def _one_place_after_another(batched: np.ndarray, batch_size: int) -> np.ndarray:
    """[steps, ..., batch x topk] -> [batch x steps, ..., topk], place by place."""
    places = batched.reshape(*batched.shape[:-1], batch_size, -1)
    alone = np.moveaxis(places, -2, 0)
    return alone.reshape(-1, *alone.shape[2:])


def without_unread(lane: Replay, strategy: Strategy) -> Replay:
    """Leaves out what a strategy does not read, so that it is not copied for every lane."""
    return Replay(
        lane.demand,
        lane.next_use if strategy.reads_future else None,
        lane.lookahead if strategy.reads_gates else None,
    )


def make_clock(
    hardware: Hardware,
    model: ModelSpec,
    trace: Trace,
    batch_size: int,
    dispatch: str,
    settings: GridSettings,
) -> LayerClock:
    """The times of one point of the grid; a sequential step serves one request."""
    return layer_clock(
        hardware,
        model,
        batch_size=batch_size if dispatch == "batched" else 1,
        context_tokens=settings.context_tokens,
        expert_bytes=trace.expert_bytes,
    )


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def _counted_steps(leaf: np.ndarray, places: int, settings: GridSettings) -> np.ndarray:
    by_place = leaf.reshape(places, -1, *leaf.shape[1:])
    return by_place[:, settings.num_warmup_steps :].sum(0)
