"""A sweep as a list of shards: strategies x batch sizes x seeds, each with all its capacities.

A shard is what one process works through at a time. The list depends on the settings alone, so
any process can take any share of it, and what one of them finished stands when another fails.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from moejax.bench._grid import simulate_lanes
from moejax.bench._requests import Requests, draw_run
from moejax.cards import Hardware, ModelSpec
from moejax.cost import LayerClock, layer_clock
from moejax.errors import UsageError
from moejax.simulate import MAX_DEPTH, Counts, Replay, ranks, replay, step_means, stream
from moejax.strategies import STRATEGIES, Strategy
from moejax.trace import Trace, batch_trace

SEEDS_PER_SHARD = 8


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep varies and what it holds fixed.

    Attributes:
      strategies: Names in the registry.
      batch_sizes: Requests that decode in lockstep.
      num_seeds: Draws of requests, which also seed the strategies.
      slots: Slots of a layer.
      num_steps: Decode steps of a draw.
      seed: Seed of the first draw.
      link_scales: Times a link is as fast as the hardware's; only with hardware.
      compute_scales: Times its compute is.
      depths: How many layers ahead a prefetch may aim at most; 0 prefetches nothing.
    """

    strategies: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    num_seeds: int
    slots: tuple[int, ...]
    num_steps: int
    seed: int = 0
    link_scales: tuple[float, ...] = (1.0,)
    compute_scales: tuple[float, ...] = (1.0,)
    depths: tuple[int, ...] = (MAX_DEPTH,)


class Shard(NamedTuple):
    """One strategy and batch size over some seeds."""

    number: int
    strategy: str
    batch_size: int
    seeds: tuple[int, ...]

    @property
    def file_name(self) -> str:
        """A name that sorts by number and says what is inside."""
        return f"{self.number:05d}-{self.strategy}-b{self.batch_size}-s{self.seeds[0]}.json"


def shards_of(settings: SweepSettings) -> tuple[Shard, ...]:
    """All shards, in the order of their records."""
    seeds = range(settings.seed, settings.seed + settings.num_seeds)
    groups = [
        tuple(seeds[start : start + SEEDS_PER_SHARD])
        for start in range(0, len(seeds), SEEDS_PER_SHARD)
    ]
    points = itertools.product(settings.strategies, settings.batch_sizes, groups)
    return tuple(Shard(number, *point) for number, point in enumerate(points))


def check_sweep(settings: SweepSettings, num_experts: int) -> None:
    """Refuses what no shard could do.

    Raises:
      UsageError: A strategy needs what the next gates say, or there are more slots than experts.
    """
    for name in settings.strategies:
        if STRATEGIES[name].needs_lookahead:
            raise UsageError(
                f"{name} only differs from lru in what it prefetches from the next gates, which a "
                "sweep does not read",
                "Use `moejax simulate --hardware` for it.",
            )
    if max(settings.slots) > num_experts:
        raise UsageError(
            f"--slots {max(settings.slots)} exceeds the {num_experts} experts of a layer",
            f"Give at most {num_experts}, or all.",
        )


def run_shard(
    shard: Shard,
    settings: SweepSettings,
    requests: Requests,
    strategy: Strategy,
    *,
    model: ModelSpec,
    hardware: Hardware | None = None,
    num_devices: int = 1,
) -> list[dict[str, Any]]:
    """Replays one shard: exact counts, and times where there is hardware.

    Args:
      shard: What to replay.
      settings: The sweep it belongs to.
      requests: Where draws come from.
      strategy: The shard's; one object for all its shards, since each is compiled anew.
      model: Whose experts they are.
      hardware: Gives the timeline its clock; None counts only.
      num_devices: Devices that share the work; no number depends on it.

    Returns:
      A record a seed and capacity, and a point of the scales and depths.

    Raises:
      UsageError: There are not so many devices.
    """
    draws = [
        draw_run(
            requests,
            seed,
            num_places=shard.batch_size,
            num_steps=settings.num_steps,
            with_lookahead=False,
        )
        for seed in shard.seeds
    ]
    experts = [batch_trace(draw, shard.batch_size, num_steps=settings.num_steps) for draw in draws]
    counts = _count(shard, settings, experts, strategy, draws[0], num_devices)
    records = []
    for lane, seed in enumerate(shard.seeds):
        head = {"strategy": shard.strategy, "batch_size": shard.batch_size, "seed": seed}
        counted = [
            head | {"slots": slots} | _counted(counts, lane, place)
            for place, slots in enumerate(settings.slots)
        ]
        if hardware is None:
            records += counted
            continue
        clock = layer_clock(
            hardware, model, batch_size=shard.batch_size, expert_bytes=draws[lane].expert_bytes
        )
        table = replay(experts[lane], model.num_experts, with_future=strategy.reads_future)
        times = _time(strategy, settings, table, clock, seed, draws[lane].topk, num_devices)
        records += [counted[place] | timed for place, timed in times]
    return records


def _count(
    shard: Shard,
    settings: SweepSettings,
    experts: Sequence[Shaped[np.ndarray, "steps layers width"]],
    strategy: Strategy,
    draw: Trace,
    num_devices: int,
) -> Counts:
    """Counts of every seed as a lane."""
    keys = [jax.random.key(seed) for seed in shard.seeds]
    slots = np.asarray(settings.slots, np.int32)
    count = functools.partial(ranks, strategy, topk=draw.topk, num_devices=num_devices)
    if len(experts) == 1:
        source = stream(experts[0], draw.num_experts, with_future=strategy.reads_future)
        return Counts(*(part[None] for part in count(source, slots, keys[0])))
    # Lanes are repeated until every device has as many.
    num_lanes = len(experts) + -len(experts) % num_devices
    places = [min(lane, len(experts) - 1) for lane in range(num_lanes)]
    lanes = np.stack([experts[place] for place in places], axis=1)
    source = stream(lanes, draw.num_experts, with_future=strategy.reads_future)
    return count(source, slots, jnp.stack([keys[place] for place in places]))


def _counted(counts: Counts, lane: int, place: int) -> dict[str, Any]:
    num_hits = int(counts.num_hits[lane, :, place].sum())
    return {
        "hit_ratio": float(counts.hit_ratio[lane, place]),
        "hit_ratio_warm": float(counts.hit_ratio_warm[lane, place]),
        "num_hits": num_hits,
        "num_loads": int(counts.num_demands[lane].sum()) - num_hits,
    }


def _time(
    strategy: Strategy,
    settings: SweepSettings,
    lane: Replay,
    clock: LayerClock,
    seed: int,
    topk: int,
    num_devices: int,
) -> list[tuple[int, dict[str, Any]]]:
    """The place of the slots of each point, and its times."""
    points = list(
        itertools.product(
            range(len(settings.slots)),
            settings.link_scales,
            settings.compute_scales,
            settings.depths,
        )
    )
    clocks = [scaled(clock, link, compute) for _, link, compute, _ in points]
    slots = np.repeat(
        np.asarray([settings.slots[place] for place, *_ in points], np.int32)[:, None],
        lane.demand.shape[1],
        axis=1,
    )
    found = simulate_lanes(
        strategy,
        [lane] * len(points),
        clocks,
        slots,
        seeds=[seed] * len(points),
        topk=topk,
        depths=[depth for *_, depth in points],
        num_devices=num_devices,
    )
    rows = []
    for (place, link, compute, depth), record, its_clock in zip(points, found, clocks, strict=True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), record)
        means = step_means(wide, its_clock)
        timed = {
            "link_scale": link,
            "compute_scale": compute,
            "depth": depth,
            "step_latency_s": means["compute_s"] + means["stall_s"],
            "timed_hit_ratio": means.pop("hit_ratio"),
            **means,
        }
        rows.append((place, timed))
    return rows


def scaled(clock: LayerClock, link_scale: float, compute_scale: float) -> LayerClock:
    """The clock of a machine whose link and compute are so many times as fast.

    The host's own compute stays as it is.
    """
    return clock._replace(
        copy_s=clock.copy_s / link_scale,
        attention_s=clock.attention_s / compute_scale,
        shared_s=clock.shared_s / compute_scale,
        expert_read_s=clock.expert_read_s / compute_scale,
        expert_token_s=clock.expert_token_s / compute_scale,
        step_fixed_s=clock.step_fixed_s / compute_scale,
    )
