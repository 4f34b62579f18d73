"""`moejax bench`: the study's experiment and this machine beside it, or the engine measured."""

import datetime
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import UsageError

from ._engine_bench import (
    CheckOption,
    EngineOption,
    EngineOptions,
    KernelsOption,
    LearnFromOption,
    NumStepsOption,
    PromptsOption,
    RandomWeightsOption,
    ReplayOption,
    ScopesOption,
    bench_engine,
    refuse_engine_options,
)
from ._engine_ladder import LadderOption, bench_ladder
from ._options import (
    DEFAULT_HARDWARE,
    DevicesOption,
    HardwareOption,
    OfflineOption,
    OutOption,
    OutputOption,
    QuickOption,
    RoutedModelOption,
    SeedOption,
    TraceOption,
    WorkloadOption,
    parse_ints,
    parse_names,
    parse_size,
    prepare_devices,
)
from ._output import OutputFormat, emit
from ._progress import say, show_progress
from ._routing import (
    check_lookahead,
    check_workload,
    model_name,
    open_routing,
    recorded_trace,
    workload_of,
)
from ._tuning import make_plan

if TYPE_CHECKING:
    from moejax.cards import ModelSpec
    from moejax.trace import Trace

REPORTS = Path("reports")

_STUDY = "on_demand,oracle,multi_look,top_k,intelligent"
_BATCH_SIZES = "1,2,4,8,16"
_NUM_RUNS, _QUICK_RUNS = 10, 3
_NUM_STEPS, _QUICK_STEPS = 128, 48


class Dispatch(enum.StrEnum):
    """How the requests of a batch share a step."""

    batched = "batched"
    sequential = "sequential"
    both = "both"


_DISPATCHES = {
    Dispatch.batched: ("batched",),
    Dispatch.sequential: ("sequential",),
    Dispatch.both: ("batched", "sequential"),
}


def bench(
    model: RoutedModelOption = None,
    hardware: HardwareOption = DEFAULT_HARDWARE,
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies",
            metavar="NAMES",
            help=f"Strategies, with commas; default: {_STUDY}; with --engine lru,intelligent.",
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            "--batch-sizes",
            metavar="NUMBERS",
            help=f"Batch sizes, with commas; default: {_BATCH_SIZES}; with --engine 1.",
        ),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option("--runs", min=1, help=f"Draws of requests; {_NUM_RUNS}, quick {_QUICK_RUNS}."),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            "--slots",
            metavar="NUMBERS",
            help="Device slots of a layer; default: half the experts. With --engine several, with "
            "commas.",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="Device bytes for slots, such as 2GB.")
    ] = "",
    dispatch: Annotated[
        Dispatch | None,
        typer.Option(
            "--dispatch", help="Requests in lockstep, one after another, or both; default: batched."
        ),
    ] = None,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit/--no-audit", help="Do the reference study's experiment too; judge its claims."
        ),
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="--audit, and cache sizes, cards, Switch, hybrids, K: about four minutes on two "
            "cores.",
        ),
    ] = False,
    engine: EngineOption = False,
    scopes: ScopesOption = None,
    num_steps: NumStepsOption = None,
    replay: ReplayOption = None,
    random_weights: RandomWeightsOption = False,
    prompts: PromptsOption = None,
    profile: LearnFromOption = None,
    kernels: KernelsOption = None,
    check: CheckOption = None,
    ladder: LadderOption = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time this machine's copies and compute.")
    ] = True,
    quick: QuickOption = False,
    devices: DevicesOption = 1,
    seed: SeedOption = 0,
    out: OutOption = None,
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Run strategies x batch sizes x runs on the simulator and write results.json.

    Times are simulated with a hardware profile; a run is another draw of requests and strategy
    seed, never added noise; all strategies have the same slots. By default this machine's copies
    and expert compute are measured as well.

    With --engine the model really decodes, its experts in host memory: every step is timed, and
    set against what the link and the memory of this machine allow. What an interrupted run has
    measured is kept.

    Example: moejax bench --out reports/first --quick
    """
    options = EngineOptions(
        model,
        strategies,
        slots,
        scopes,
        batch_sizes,
        num_steps,
        replay,
        random_weights,
        prompts,
        profile,
        kernels,
        check,
        measure,
        quick,
        seed,
    )
    if engine:
        simulated = {
            "--hardware": hardware != DEFAULT_HARDWARE,
            "--trace": trace is not None,
            "--workload": workload is not None,
            "--runs": runs is not None,
            "--budget": bool(budget),
            "--dispatch": dispatch is not None,
            "--devices": devices != 1,
            "--audit": audit,
            "--full": full,
        }
        _refuse_simulated(simulated)
        folder = out or new_folder()
        _check_writable(folder)
        run_engine = bench_ladder if ladder else bench_engine
        run_engine(options, folder, output, fit=_fit_this_machine)
        return
    if ladder:
        raise UsageError("--ladder has no meaning in a simulation", "Add --engine.")
    refuse_engine_options(options)
    prepare_devices(devices)
    from moejax.bench import GridSettings, check_shape, run_bench
    from moejax.cards import load_hardware, load_model
    from moejax.results import write_json
    from moejax.strategies import STRATEGIES

    names = parse_names(strategies or _STUDY, "--strategies", tuple(STRATEGIES))
    sizes = parse_ints(batch_sizes or _BATCH_SIZES, "--batch-sizes", minimum=1, maximum=255)
    recorded = recorded_trace(trace, workload, model)
    spec = load_model(model_name(model, recorded, workload), offline=offline)
    machine = load_hardware(hardware)
    workload = check_workload(workload or workload_of(spec))
    if recorded is not None:
        check_shape(recorded, spec)
    check_lookahead(names, recorded)
    settings = GridSettings(
        strategies=names,
        batch_sizes=sizes,
        num_runs=runs or (_QUICK_RUNS if quick else _NUM_RUNS),
        slots=_slots(slots, budget, spec, recorded),
        dispatches=_DISPATCHES[dispatch or Dispatch.batched],
        num_steps=_QUICK_STEPS if quick else _NUM_STEPS,
        seed=seed,
    )
    folder = out or new_folder()
    _check_writable(folder)
    with show_progress("bench") as progress:
        results = run_bench(
            settings,
            spec,
            machine,
            trace=recorded,
            workload=workload,
            measure=measure,
            quick=quick,
            num_devices=devices,
            audit=audit or full,
            further=full,
            progress=progress,
        )
        progress(0, 1, "tuning tiers")
        device_bytes = results["grid"][0]["capacity_bytes"]
        routing = recorded or open_routing(workload, seed)
        plan = None
        if device_bytes:
            plan, _ = make_plan(routing, spec, machine, device_bytes, seed=seed)
    if measure:
        _fit_this_machine(folder, results)
    if plan is not None:
        write_json(folder / "plan.json", plan.to_json())
    path = folder / "results.json"
    write_json(path, results)
    say(f"wrote {path} ({len(results['grid'])} points); next: moejax report {folder}")
    say(f"times are simulated with the profile {machine.name}: {machine.title}")
    num_requests = results["trace"]["num_test_requests"]
    if num_requests is not None and num_requests < max(sizes):
        say(
            f"warning: the trace leaves {num_requests} request(s) to test on; larger batches "
            "decode copies of a request, which share experts as no other requests do"
        )
    num_tokens = results["trace"]["num_test_tokens"]
    num_replayed = max(sizes) * (settings.num_steps + settings.num_warmup_steps)
    if num_tokens is not None and num_tokens < num_replayed:
        say(
            f"warning: the trace leaves {num_tokens:,} tokens to test on and a run at batch "
            f"{max(sizes)} replays {num_replayed:,}; some come again, which flatters every cache"
        )
    if results["trace"]["workload"]:
        say(f"routing is synthetic: the workload {results['trace']['workload']!r}, calibrated")
    emit(_means(results["grid"]), output)


def _refuse_simulated(is_given: dict[str, bool]) -> None:
    given = [name for name, is_there in is_given.items() if is_there]
    cures = {
        "--trace": "Replay a trace with --replay.",
        "--budget": "Give the slots of a layer with --slots.",
    }
    if given:
        cure = cures.get(given[0], f"Leave out {given[0]}, or --engine.")
        raise UsageError(f"{given[0]} has no meaning for a real engine", cure)


def _slots(
    text: str | None, budget: str, spec: "ModelSpec", trace: "Trace | None"
) -> tuple[int, ...]:
    from moejax.simulate import slots_within

    if text is not None and budget:
        raise UsageError("--slots and --budget exclude each other", "Give one of them.")
    numbers = () if text is None else parse_ints(text, "--slots", minimum=0)
    if len(numbers) > 1:
        raise UsageError(f"--slots {text} is more than one number", "Several go with --engine.")
    slots = numbers[0] if numbers else None
    layers, experts = spec.num_moe_layers, spec.num_experts
    if budget:
        sizes = [spec.expert_bytes] * layers
        if trace is not None and trace.expert_bytes is not None:
            sizes = [int(size) for size in trace.expert_bytes]
        return slots_within(parse_size(budget, "--budget"), sizes, experts)
    if slots is not None and slots > experts:
        raise UsageError(
            f"--slots {slots} exceeds the {experts} experts of a layer of {spec.name}",
            f"Give at most {experts}.",
        )
    return (experts // 2 if slots is None else slots,) * layers


def new_folder() -> Path:
    """A folder under reports/ that no other run has."""
    return REPORTS / f"run-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be written before minutes of work go into it."""
    import os

    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise UsageError(f"--out {folder}: {place} is a file", "Name a folder.")
    if not os.access(place, os.W_OK):
        raise UsageError(f"--out {folder}: {place} is read-only", "Name another folder.")


def _fit_this_machine(folder: Path, results: dict[str, Any]) -> None:
    """Fits a profile to what was measured here and stores it beside the results."""
    from moejax.bench import machine_profile
    from moejax.cost import format_profile
    from moejax.results import write_text

    profile = machine_profile(results, command="moejax bench")
    write_text(folder / "this-machine.toml", format_profile(profile))
    device = results["environment"]["device"]
    say(f"wrote {folder / 'this-machine.toml'}: a profile measured on {device}")


def _means(grid: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a strategy, batch size and dispatch: means over runs."""
    rows = []
    points = dict.fromkeys((r["strategy"], r["batch_size"], r["dispatch"]) for r in grid)
    for name, size, dispatch in points:
        head = {"strategy": name, "batch_size": size, "dispatch": dispatch}
        runs = [run for run in grid if head.items() <= run.items()]
        mean = {
            key: sum(run[key] for run in runs) / len(runs)
            for key in ("hit_ratio", "fetched_bytes", "wasted_bytes", "stall_s", "memory_bytes")
        }
        latency_s = sum(run["latency_s"]["mean"] for run in runs) / len(runs)
        rows.append(head | {"num_runs": len(runs), "latency_s": latency_s} | mean)
    return rows
