"""`moejax simulate`: replay a trace through caches of every size."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moejax.errors import UsageError

from ._options import (
    OfflineOption,
    OutputOption,
    SeedOption,
    TraceOption,
    WorkloadOption,
    parse_ints,
    parse_names,
    parse_sizes,
)
from ._output import OutputFormat, emit
from ._progress import say, show_progress
from ._routing import check_batch, check_lookahead, open_routing, recorded_trace, workload_of

if TYPE_CHECKING:
    from moejax.cards import ModelSpec
    from moejax.strategies import Profile
    from moejax.trace import Trace

_COLUMNS = ("strategy", "slots", "scope", "hit_ratio", "hit_ratio_warm", "num_hits", "num_loads")
_TIMES = ("step_latency_s", "stall_s", "fetched_bytes", "timed_hit_ratio", "late_ratio")


class Scope(enum.StrEnum):
    """Who shares slots."""

    layer = "layer"
    pool = "pool"


def simulate(
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAMES", help="Strategies, with commas.")
    ] = "lru,lfu,oracle",
    slots: Annotated[
        str,
        typer.Option(
            "--slots",
            metavar="NUMBERS",
            help="Slots of a layer (of the whole pool with --scope pool), with commas; "
            "default: 1/16, 1/8, 1/4 and 1/2 of the experts.",
        ),
    ] = "",
    capacity: Annotated[
        str,
        typer.Option(
            "--capacity", metavar="SIZES", help="Bytes for all layers instead of --slots."
        ),
    ] = "",
    scope: Annotated[
        Scope, typer.Option("--scope", help="Slots for each layer, or one pool for all.")
    ] = Scope.layer,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=255, help="Requests decoded in lockstep.")
    ] = 1,
    reset_per_request: Annotated[
        bool, typer.Option("--reset-per-request", help="Empty the cache before each request.")
    ] = False,
    always_admit: Annotated[
        bool,
        typer.Option(
            "--always-admit",
            help="A demanded expert always enters the cache, as in classic simulators, even where "
            "it is not worth a slot.",
        ),
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile", metavar="FILE", help="Trace to learn from, not the replayed one."
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", metavar="PROFILE", help="Add simulated times on this machine."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Model, if the trace names none."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Replay only the first steps.")
    ] = None,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Replay a trace in order and count hits and loads of every strategy and cache size.

    Counts are exact and of demand fetching alone: one token an event, the cache carried across
    requests. `hit_ratio` counts every load as a miss; `hit_ratio_warm` forgives first touches
    while a slot is free, as published curves do. With --hardware the timeline adds prefetch,
    latency, stalls and bytes.

    Example: moejax simulate --trace gpt-oss.safetensors --strategy lru,oracle --slots 4,8,16
    """
    from moejax.simulate import check_pool_strategies, replay, sweep, sweep_pool
    from moejax.strategies import STRATEGIES
    from moejax.trace import batch_trace

    names = parse_names(strategy, "--strategy", tuple(STRATEGIES))
    if slots and capacity:
        raise UsageError("--slots and --capacity exclude each other", "Give one of them.")
    if scope is Scope.pool:
        check_pool_strategies(names)
    if scope is Scope.pool and hardware:
        raise UsageError(
            "--hardware times caches of each layer, not a pool", "Use --scope layer with it."
        )
    if scope is Scope.pool and always_admit:
        raise UsageError(
            "--always-admit ranks the experts of each layer, not of a pool", "Use --scope layer."
        )
    if reset_per_request and batch_size > 1:
        raise UsageError(
            f"--reset-per-request has no meaning in a batch of {batch_size}", "Use --batch-size 1."
        )
    recorded = recorded_trace(trace, workload, model)
    routing = recorded or open_routing(workload or _own_workload(model, offline), seed, batch_size)
    check_batch(routing, batch_size)
    learned = _learn(names, routing, profile)
    # A model that was named must be the one that is replayed, even where nothing asks its sizes.
    needs_model = bool(hardware) or (bool(capacity) and routing.expert_bytes is None)
    needs_model |= bool(model) and recorded is None
    spec = _model(model or routing.model, routing, offline) if needs_model else None
    size = _expert_bytes(routing, spec)
    rows, labels = _capacities(slots, capacity, scope, routing, size)
    experts = batch_trace(routing, batch_size, num_steps=max_steps)
    said = _lookahead(names, routing, batch_size, len(experts))
    with_future = any(STRATEGIES[name].needs_future for name in names)
    lane = replay(experts, routing.num_experts, with_future=with_future, lookahead=said)
    marks = _marks(routing, batch_size, len(experts), reset_per_request)
    shared = {"topk": routing.topk, "marks": marks, "profile": learned, "seed": seed}
    with show_progress("simulating") as progress:
        if scope is Scope.pool:
            weight = size if capacity else None
            _warn_of_cliff(rows, lane.demand, weight)
            records = sweep_pool(names, lane, rows, weight=weight, progress=progress, **shared)
        else:
            clock = None
            if hardware and spec is not None:
                clock = _clock(hardware, spec, batch_size, size)
            shared |= {"clock": clock, "admits_always": always_admit}
            records = sweep(names, lane, rows, progress=progress, **shared)
    records = [
        {"strategy": record["strategy"], **labels[i % len(labels)], **record}
        for i, record in enumerate(records)
    ]
    if routing.phase is None:
        for record in records:
            record.pop("decode_hit_ratio", None)
    if routing.workload:
        say(f"note: synthetic routing of the workload {routing.workload!r}, not recorded")
    shown = [key for key in (*_COLUMNS, "decode_hit_ratio", *_TIMES) if key in records[0]]
    emit(records, output, columns=shown)


def _learn(names: tuple[str, ...], routing: "Trace", path: Path | None) -> "Profile | None":
    from moejax.strategies import STRATEGIES, learn_profile
    from moejax.trace import load_trace

    if path is None:
        helpless = [name for name in names if STRATEGIES[name].needs_profile]
        if helpless:
            raise UsageError(
                f"{helpless[0]} learns from a profile and none was given",
                "Give --profile FILE, a trace of other requests of the same model.",
            )
        untrained = [name for name in names if STRATEGIES[name].learns]
        if untrained:
            say(f"note: no --profile, so {', '.join(untrained)} start(s) knowing nothing")
        return None
    learned_from = load_trace(path)
    shapes = [(one.num_layers, one.num_experts, one.topk) for one in (learned_from, routing)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"the profile has (layers, experts, topk) {shapes[0]}, the trace {shapes[1]}",
            "Give a profile of the same model.",
        )
    if learned_from.sha256 == routing.sha256:
        raise UsageError(
            "the profile is the trace itself", "Learning from the test would be cheating."
        )
    learns = any(STRATEGIES[name].learns for name in names)
    return learn_profile(learned_from) if learns else None


def _own_workload(model: str | None, offline: bool) -> str:
    from moejax.cards import load_model
    from moejax.workloads import default_workload

    return workload_of(load_model(model, offline=offline)) if model else default_workload


def _model(name: str, routing: "Trace", offline: bool) -> "ModelSpec | None":
    from moejax.bench import check_shape
    from moejax.cards import load_model

    if not name:
        raise UsageError(
            "bytes and times need a model and the trace names none", "Name it with --model."
        )
    spec = load_model(name, offline=offline)
    check_shape(routing, spec)
    return spec


def _expert_bytes(routing: "Trace", spec: "ModelSpec | None"):
    import numpy as np

    if routing.expert_bytes is not None:
        return np.asarray(routing.expert_bytes)
    return None if spec is None else np.full(routing.num_layers, spec.expert_bytes, np.int64)


def _capacities(slots: str, capacity: str, scope: Scope, routing: "Trace", size):
    """Rows for the simulator, and what each record says of its capacity."""
    import numpy as np

    from moejax.simulate import slots_within

    if capacity:
        limits = parse_sizes(capacity, "--capacity")
        if scope is Scope.pool:
            # Experts of different layers differ in size, so bytes are no number of slots.
            labels = [{"slots": None, "capacity_bytes": limit} for limit in limits]
            return np.asarray(limits), labels
        plans = [slots_within(limit, size, routing.num_experts) for limit in limits]
        labels = [
            {"slots": max(plan), "capacity_bytes": limit}
            for plan, limit in zip(plans, limits, strict=True)
        ]
        return np.asarray(plans, np.int32), labels
    most = routing.num_experts * (routing.num_layers if scope is Scope.pool else 1)
    shares = (most // 16, most // 8, most // 4, most // 2)
    numbers = (
        parse_ints(slots, "--slots", maximum=most)
        if slots
        else tuple(dict.fromkeys(max(1, share) for share in shares))
    )
    labels = [{"slots": number} for number in numbers]
    if scope is Scope.pool:
        return np.asarray(numbers), labels
    return np.repeat(np.asarray(numbers, np.int32)[:, None], routing.num_layers, axis=1), labels


def _lookahead(names: tuple[str, ...], routing: "Trace", batch_size: int, num_steps: int):
    from moejax.bench import batch_lookahead
    from moejax.strategies import STRATEGIES

    check_lookahead(names, routing)
    if not any(STRATEGIES[name].needs_lookahead for name in names):
        return None
    return batch_lookahead(routing, batch_size, num_steps)


def _marks(routing: "Trace", batch_size: int, num_steps: int, reset_per_request: bool):
    import numpy as np

    from moejax.simulate import Marks
    from moejax.trace import batch_tokens

    tokens = batch_tokens(routing, batch_size, num_steps=num_steps)
    is_decode = np.ones(num_steps, bool)
    if routing.phase is not None:
        # A step of a batch counts as decode when every busy place decodes.
        is_decode = ((routing.phase[tokens] == 1) | (tokens < 0)).all(-1)
    is_reset = np.zeros(num_steps, bool)
    if reset_per_request:
        is_reset[np.isin(tokens[:, 0], routing.request_start[:-1])] = True
    return Marks(is_decode, is_reset)


def _clock(hardware: str, spec: "ModelSpec", batch_size: int, size):
    from moejax.cards import load_hardware
    from moejax.cost import layer_clock

    profile = load_hardware(hardware)
    say(f"note: times are simulated with the profile {profile.name}: {profile.title}")
    return layer_clock(profile, spec, batch_size=batch_size, expert_bytes=size)


def _warn_of_cliff(capacities, demand, weight) -> None:
    """A pool below one step's cycle through the layers thrashes: says so before running."""
    import numpy as np

    mean_demand = float((demand > 0).sum(-1).mean())
    cycle = int(np.ceil((demand.shape[1] - 1) * mean_demand)) + 1
    each = 1 if weight is None else float(np.mean(weight))
    for capacity in capacities:
        if capacity / each < cycle:
            say(
                f"warning: a pool of {int(capacity / each)} experts is below one step's cycle of "
                f"{cycle}; an LRU pool would hardly hit. Raise it or use --scope layer."
            )
