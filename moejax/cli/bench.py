"""`moejax bench`: the study's experiment, and this machine measured beside it."""

import datetime
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import UsageError

from ._options import (
    DEFAULT_HARDWARE,
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
    from moejax.cards import Hardware, ModelSpec
    from moejax.trace import Trace

REPORTS = Path("reports")

_STUDY = "on_demand,oracle,multi_look,top_k,intelligent"
_NUM_RUNS, _QUICK_RUNS = 10, 3
_NUM_STEPS, _QUICK_STEPS = 128, 48


class Dispatch(enum.StrEnum):
    """How the requests of a batch share a step."""

    batched = "batched"
    sequential = "sequential"
    both = "both"


def bench(
    model: RoutedModelOption = None,
    hardware: HardwareOption = DEFAULT_HARDWARE,
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    strategies: Annotated[
        str, typer.Option("--strategies", metavar="NAMES", help="Strategies, with commas.")
    ] = _STUDY,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", metavar="NUMBERS", help="Batch sizes, with commas.")
    ] = "1,2,4,8,16",
    runs: Annotated[
        int | None,
        typer.Option("--runs", min=1, help=f"Draws of requests; {_NUM_RUNS}, quick {_QUICK_RUNS}."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", min=0, help="Device slots of a layer; default: half the experts."),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="Device bytes for slots, such as 2GB.")
    ] = "",
    dispatch: Annotated[
        Dispatch,
        typer.Option("--dispatch", help="Requests in lockstep, one after another, or both."),
    ] = Dispatch.batched,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time this machine's copies and compute.")
    ] = True,
    quick: QuickOption = False,
    seed: SeedOption = 0,
    out: OutOption = None,
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Run strategies x batch sizes x runs on the simulator and write results.json.

    Times are simulated with a hardware profile; a run is another draw of requests and strategy
    seed, never added noise; all strategies have the same slots. By default this machine's copies
    and expert compute are measured as well.

    Example: moejax bench --out reports/first --quick
    """
    from moejax.bench import GridSettings, check_shape, run_bench
    from moejax.cards import load_hardware, load_model
    from moejax.results import write_json
    from moejax.strategies import STRATEGIES

    names = parse_names(strategies, "--strategies", tuple(STRATEGIES))
    sizes = parse_ints(batch_sizes, "--batch-sizes", minimum=1, maximum=255)
    recorded = recorded_trace(trace, workload, model)
    spec = load_model(model_name(model, recorded, workload), offline=offline)
    profile = load_hardware(hardware)
    workload = check_workload(workload or workload_of(spec))
    if recorded is not None:
        check_shape(recorded, spec)
    check_lookahead(names, recorded)
    settings = GridSettings(
        strategies=names,
        batch_sizes=sizes,
        num_runs=runs or (_QUICK_RUNS if quick else _NUM_RUNS),
        slots=_slots(slots, budget, spec, recorded),
        dispatches=("batched", "sequential") if dispatch is Dispatch.both else (dispatch.value,),
        num_steps=_QUICK_STEPS if quick else _NUM_STEPS,
        seed=seed,
    )
    folder = out or new_folder()
    _check_writable(folder)
    with show_progress("bench") as progress:
        results = run_bench(
            settings,
            spec,
            profile,
            trace=recorded,
            workload=workload,
            measure=measure,
            quick=quick,
            progress=progress,
        )
        progress(0, 1, "tuning tiers")
        device_bytes = results["grid"][0]["capacity_bytes"]
        routing = recorded or open_routing(workload, seed)
        plan = make_plan(routing, spec, profile, device_bytes, seed=seed) if device_bytes else None
    if measure:
        _fit_this_machine(folder, results)
    if plan is not None:
        write_json(folder / "plan.json", plan.to_json())
    path = folder / "results.json"
    write_json(path, results)
    say(f"wrote {path} ({len(results['grid'])} points); next: moejax report {folder}")
    say(f"times are simulated with the profile {profile.name}: {profile.title}")
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


def _slots(
    slots: int | None, budget: str, spec: "ModelSpec", trace: "Trace | None"
) -> tuple[int, ...]:
    from moejax.simulate import slots_within

    if slots is not None and budget:
        raise UsageError("--slots and --budget exclude each other", "Give one of them.")
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
    from moejax.cost import fit_profile, format_profile
    from moejax.results import write_text

    device = results["environment"]["device"]
    measured = results["measured"]
    fitted = fit_profile(
        [*measured["transfer"], *measured["compute"]],
        base=_profile_of(device),
        name="this-machine",
        title=f"measured on {device} by moejax bench",
    )
    write_text(folder / "this-machine.toml", format_profile(fitted))
    say(f"wrote {folder / 'this-machine.toml'}: a profile measured on {device}")


def _profile_of(device: str) -> "Hardware | None":
    """The profile of this kind of device, which supplies what was not measured; None if none."""
    from moejax.cards import HARDWARE, load_hardware

    words = device.lower().replace("-", " ").split()
    return next(
        (load_hardware(name) for name in HARDWARE if set(name.split("-")) <= set(words)), None
    )


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
