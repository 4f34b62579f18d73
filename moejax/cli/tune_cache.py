"""`moejax tune-cache`: how many slots each layer gets in each memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import UsageError
from moejax.units import format_bytes, format_ratio, format_seconds

from ._devices_plan import show_devices_plan, tier_rows
from ._options import (
    DEFAULT_HARDWARE,
    HardwareOption,
    OfflineOption,
    OutOption,
    OutputOption,
    RoutedModelOption,
    SeedOption,
    TraceOption,
    WorkloadOption,
    parse_size,
)
from ._output import OutputFormat, emit
from ._progress import say
from ._routing import check_batch, model_name, open_routing, recorded_trace, workload_of
from ._tuning import DEFAULT_HOST, DEFAULT_PINNED, make_devices_plan, make_plan

if TYPE_CHECKING:
    from moejax.cards import Hardware, ModelSpec
    from moejax.tune import Certainty, Plan


def tune_cache(
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="Device bytes, such as 2GB or 2GiB.")
    ],
    model: RoutedModelOption = None,
    hardware: HardwareOption = DEFAULT_HARDWARE,
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME", help="Retention to tune for.")
    ] = "lru",
    objective: Annotated[
        str, typer.Option("--objective", metavar="NAME", help="latency, p99 or bytes.")
    ] = "latency",
    pinned_budget: Annotated[
        str, typer.Option("--pinned-budget", metavar="SIZE", help="Pinned host bytes for slots.")
    ] = DEFAULT_PINNED,
    host_budget: Annotated[
        str, typer.Option("--host-budget", metavar="SIZE", help="Pageable host bytes for slots.")
    ] = DEFAULT_HOST,
    include_dense: Annotated[
        bool,
        typer.Option(
            "--include-dense", help="Dense weights, KV cache and workspace share the budget."
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=255, help="Requests decoded in lockstep.")
    ] = 1,
    context_tokens: Annotated[
        int, typer.Option("--context-tokens", min=1, help="Tokens in each request's KV cache.")
    ] = 512,
    devices: Annotated[
        int,
        typer.Option(
            "--devices",
            min=1,
            metavar="N",
            help="Devices that share the experts, each with the budget and a link of its own.",
        ),
    ] = 1,
    seed: SeedOption = 0,
    out: OutOption = None,
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Size the cache tiers of every layer for a budget and predict what that buys.

    Latencies are predicted by the cost model of a hardware profile from exact hit curves of the
    trace or workload. The plan is never worse than the same slots for every layer, and its gap to
    the exact optimum is printed with it. --out FILE.json stores it. With --devices, expert e of
    every layer belongs to device e modulo N, and a layer takes as long as its slowest device.

    Example: moejax tune-cache --budget 2GB
    """
    from moejax.cards import load_hardware, load_model
    from moejax.strategies import STRATEGIES
    from moejax.tune import OBJECTIVES

    if objective not in OBJECTIVES:
        raise UsageError(
            f"--objective: {objective!r} is not known", f"Known: {', '.join(OBJECTIVES)}."
        )
    if strategy not in STRATEGIES:
        raise UsageError(
            f"--strategy: {strategy!r} is not known", f"Known: {', '.join(STRATEGIES)}."
        )
    budget_bytes = parse_size(budget, "--budget")
    pinned_bytes = parse_size(pinned_budget, "--pinned-budget")
    host_bytes = parse_size(host_budget, "--host-budget")
    target = None if out is None else _json_file(out)
    recorded = recorded_trace(trace, workload, model)
    spec = load_model(model_name(model, recorded, workload), offline=offline)
    profile = load_hardware(hardware)
    routing = recorded or open_routing(workload or workload_of(spec), seed, batch_size)
    check_batch(routing, batch_size)
    origin = {
        "batch_size": batch_size,
        "context_tokens": context_tokens,
        "workload": routing.workload,
        "trace": str(trace) if trace is not None else None,
    }
    if devices > 1:
        if objective != "latency":
            raise UsageError(
                f"--objective {objective} is not planned for {devices} devices",
                "Use --objective latency, or --devices 1.",
            )
        shared = make_devices_plan(
            routing,
            spec,
            profile,
            budget_bytes,
            devices,
            pinned_budget_bytes=pinned_bytes,
            strategy=strategy,
            batch_size=batch_size,
            context_tokens=context_tokens,
            include_dense=include_dense,
            seed=seed,
        )
        if not include_dense:
            _warn_of_vram(budget_bytes, spec, profile)
        _hand_over(shared.to_json() | origin, target, profile, routing.workload, output)
        if output is OutputFormat.table:
            show_devices_plan(shared, profile.title)
        return
    plan, sure = make_plan(
        routing,
        spec,
        profile,
        budget_bytes,
        pinned_budget_bytes=pinned_bytes,
        host_budget_bytes=host_bytes,
        strategy=strategy,
        objective=objective,
        batch_size=batch_size,
        context_tokens=context_tokens,
        include_dense=include_dense,
        seed=seed,
    )
    if not include_dense:
        _warn_of_vram(budget_bytes, spec, profile)
    record = plan.to_json() | {
        "latency_interval_s": None if sure is None else list(sure.latency_interval_s),
        "beats_uniform_probability": None if sure is None else sure.beats_uniform_probability,
        "beats_lru_probability": None if sure is None else sure.beats_lru_probability,
        "ties": None if sure is None else list(sure.ties),
        **origin,
    }
    _hand_over(record, target, profile, routing.workload, output)
    if sure is None:
        say(f"the profile {profile.name} does not say how sure it is: there is no interval")
    if output is OutputFormat.table:
        _show(plan, sure, profile.title)


def _hand_over(
    record: dict[str, Any],
    target: Path | None,
    hardware: "Hardware",
    workload: str | None,
    output: OutputFormat,
) -> None:
    """Stores the plan, says what it rests on, and prints it unless it becomes a table."""
    from moejax.results import write_json

    if target is not None:
        write_json(target, record)
        say(f"wrote {target}")
    say(f"predicted with the profile {hardware.name}: {hardware.title}")
    if workload:
        say(f"routing is synthetic: the workload {workload!r}")
    if output is not OutputFormat.table:
        emit(record, output)


def _warn_of_vram(budget_bytes: int, spec: "ModelSpec", hardware: "Hardware") -> None:
    """Slots are not all that a card must hold: says so when the rest no longer fits beside them."""
    spent_bytes = min(budget_bytes, spec.routed_bytes) + spec.dense_bytes
    vram_bytes = hardware.value("vram_bytes")
    if spent_bytes > vram_bytes:
        say(
            f"warning: with {format_bytes(spec.dense_bytes)} of other weights these slots exceed "
            f"the card's {format_bytes(vram_bytes)}; --include-dense puts both into the budget"
        )


def _json_file(path: Path) -> Path:
    if path.suffix != ".json":
        raise UsageError(f"--out {path} is not a .json file", "Plans are stored as JSON.")
    return path


def _show(plan: "Plan", sure: "Certainty | None", hardware: str) -> None:
    """The plan for people: what to set, then what it buys."""
    from moejax.tune import is_tie

    title = f"{plan.model}, {plan.strategy}, on {hardware}"
    emit(tier_rows(plan.tiers), OutputFormat.table, title=title)
    gain = plan.gain_over_uniform_ratio
    lines = {
        "step latency": format_seconds(plan.step_latency_s),
        "same slots for every layer": format_seconds(plan.uniform_step_latency_s),
        "gain over that": format_ratio(gain),
        "hit ratio": format_ratio(plan.hit_ratio),
        "fetched a step": format_bytes(plan.fetched_bytes),
        "above the exact optimum by at most": format_ratio(plan.optimum_gap_ratio),
        "next 100 MB on the device": format_seconds(plan.marginal_s_per_100mb),
        "used of the budget": f"{format_bytes(plan.used_bytes)} of "
        f"{format_bytes(plan.budget_bytes)}",
    }
    chances = _chances(plan, sure)
    if sure is not None:
        low_s, high_s = sure.latency_interval_s
        interval = f"{format_seconds(low_s)} to {format_seconds(high_s)}"
        lines["90 % interval of the step latency"] = interval
    lines |= {f"chance to beat {name}": format_ratio(chance) for name, chance in chances.items()}
    for name, value in lines.items():
        print(f"{name:36} {value}")
    for name, chance in chances.items():
        if is_tie(chance):
            print(f"note: a tie with {name}: either may be the faster one when measured.")
        elif chance < 0.5:
            print(f"note: {name} is faster.")
    for warning in plan.warnings:
        print(f"note: {warning}")


def _chances(plan: "Plan", sure: "Certainty | None") -> dict[str, float]:
    if sure is None:
        return {}
    chances = {"equal slots": sure.beats_uniform_probability}
    if plan.strategy != "lru":
        chances["lru with equal slots"] = sure.beats_lru_probability
    return chances
