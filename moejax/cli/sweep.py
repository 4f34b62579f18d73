"""`moejax sweep`: strategies x capacities x batch sizes x seeds, by any number of processes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import UsageError

from ._options import (
    DevicesOption,
    OfflineOption,
    OutputOption,
    RoutedModelOption,
    SeedOption,
    TraceOption,
    WorkloadOption,
    parse_ints,
    parse_names,
    parse_numbers,
    prepare_devices,
)
from ._output import OutputFormat, emit
from ._progress import say, show_progress
from ._routing import check_workload, model_name, recorded_trace, workload_of
from ._team import InterruptError, Team, is_supervised, join_team, supervise

if TYPE_CHECKING:
    from moejax.bench import Requests, SweepSettings
    from moejax.cards import Hardware, ModelSpec

_NUM_STEPS = 512
_ALL = "all"
_COLUMNS = ("strategy", "batch_size", "seed", "slots", "hit_ratio", "hit_ratio_warm", "num_loads")
_TIMES = ("link_scale", "compute_scale", "depth", "step_latency_s", "stall_s")


def sweep(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", help="Where shards and results.json go.", show_default=False
        ),
    ],
    model: RoutedModelOption = None,
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAMES", help="Strategies, with commas.")
    ] = "lru,lfu,oracle",
    slots: Annotated[
        str,
        typer.Option("--slots", metavar="NUMBERS", help="Slots of a layer, or all."),
    ] = _ALL,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", metavar="NUMBERS", help="Batch sizes, with commas.")
    ] = "1",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, metavar="N", help="Draws of requests.")
    ] = 1,
    num_steps: Annotated[
        int | None,
        typer.Option(
            "--num-steps",
            min=2,
            help=f"Steps of a draw; default: all that a trace has, {_NUM_STEPS} of a workload.",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", metavar="PROFILE", help="Add simulated times on this machine."),
    ] = None,
    link_scales: Annotated[
        str, typer.Option("--link-scales", metavar="NUMBERS", help="Times its link is as fast.")
    ] = "1",
    compute_scales: Annotated[
        str,
        typer.Option("--compute-scales", metavar="NUMBERS", help="Times its compute is as fast."),
    ] = "1",
    depths: Annotated[
        str,
        typer.Option("--depths", metavar="NUMBERS", help="Layers a prefetch may aim ahead."),
    ] = "3",
    devices: DevicesOption = 1,
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator",
            metavar="HOST:PORT",
            help="Where process 0 is to be found; auto in a cluster that JAX knows.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, metavar="N", help="Processes of a job."),
    ] = None,
    process_id: Annotated[
        int | None, typer.Option("--process-id", min=0, metavar="I", help="Which of them this is.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds of this very sweep.")
    ] = False,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Replay many draws of a trace or workload for every strategy, capacity and batch size.

    Counts are exact, of demand fetching alone; with --hardware the timeline adds prefetch and
    simulated times at every scale of link and compute. Every finished shard is stored, so an
    interrupted sweep goes on with --resume. The numbers depend neither on the devices nor on the
    processes that share the work; of a job, process 0 prints.

    Example: moejax sweep --strategy lru,oracle --slots all --seeds 8 --out reports/sweep
    """
    if coordinator is not None and not is_supervised():
        raise typer.Exit(supervise())
    points = {
        "link_scales": parse_numbers(link_scales, "--link-scales"),
        "compute_scales": parse_numbers(compute_scales, "--compute-scales"),
        "depths": parse_ints(depths, "--depths", minimum=0, maximum=3),
    }
    if hardware is None and (link_scales, compute_scales, depths) != ("1", "1", "3"):
        raise UsageError(
            "--link-scales, --compute-scales and --depths scale the times of --hardware",
            "Name a profile, for example --hardware rtx-3090.",
        )
    prepare_devices(devices)
    team = join_team(coordinator, num_processes, process_id)
    try:
        records = _sweep(
            team, out, model, trace, workload, strategy, slots, batch_sizes, seeds, num_steps,
            hardware, points, devices, resume, seed, offline,
        )  # fmt: skip
        if team.process_id == 0:
            shown = [key for key in (*_COLUMNS, *_TIMES) if key in records[0]]
            emit(records, output, columns=shown)
        team.leave()
    except Exception as error:
        team.abort(error)
    except KeyboardInterrupt:
        say(f"finished shards are in {out}; go on with --resume")
        if team.num_processes > 1:
            team.abort(InterruptError("interrupted", "Go on with --resume."))
        raise


def _sweep(
    team: Team,
    out: Path,
    model: str | None,
    trace: str | None,
    workload: str | None,
    strategy: str,
    slots: str,
    batch_sizes: str,
    seeds: int,
    num_steps: int | None,
    hardware: str | None,
    points: dict[str, Any],
    devices: int,
    resume: bool,
    seed: int,
    offline: bool,
) -> list[dict[str, Any]]:
    """Takes this process's share of the shards; process 0 returns all records."""
    from moejax.bench import (
        SweepSettings,
        check_sweep,
        describe_sweep,
        digest_of,
        open_requests,
        open_sweep,
        shards_of,
    )
    from moejax.cards import load_hardware, load_model
    from moejax.strategies import STRATEGIES

    names = parse_names(strategy, "--strategy", tuple(STRATEGIES))
    sizes = parse_ints(batch_sizes, "--batch-sizes", minimum=1, maximum=255)
    recorded = recorded_trace(trace, workload, model)
    spec = load_model(model_name(model, recorded, workload), offline=offline)
    machine = None if hardware is None else load_hardware(hardware)
    requests = open_requests(recorded, check_workload(workload or workload_of(spec)), spec, seed)
    if num_steps is None:
        num_steps = _NUM_STEPS
        if requests.test is not None:
            num_steps = max(2, requests.test.num_tokens // max(sizes))
    settings = SweepSettings(
        names, sizes, seeds, _slots(slots, spec.num_experts), num_steps, seed, **points
    )
    check_sweep(settings, spec.num_experts)
    description = describe_sweep(
        settings,
        requests.profile if recorded is None else recorded,
        requests.workload,
        spec.name,
        None if machine is None else machine.name,
    )
    team.agree_on(digest_of(description))
    if team.process_id == 0:
        open_sweep(out, description, resumes=resume)
    team.wait_for_start()
    shards = shards_of(settings)
    with show_progress("sweep") as progress:
        _work(team, out, shards, settings, requests, spec, machine, devices, description, progress)
        team.wait_for_all()
    return _finish(team, out, shards, description)


def _work(
    team: Team,
    out: Path,
    shards,
    settings: "SweepSettings",
    requests: "Requests",
    spec: "ModelSpec",
    machine: "Hardware | None",
    devices: int,
    description: dict[str, Any],
    progress,
) -> None:
    from moejax.bench import digest_of, finished, learn, num_finished, run_shard, write_shard
    from moejax.strategies import STRATEGIES

    digest = digest_of(description)
    mine = shards[team.process_id :: team.num_processes]
    is_done = finished(out, mine, digest)
    if is_done:
        say(f"{len(is_done)} of {len(mine)} shards of this process were there already")
    left = [shard for shard in mine if shard.number not in is_done]
    profile = learn(requests) if left else None
    names = {shard.strategy for shard in left}
    strategies = {name: STRATEGIES[name].make(profile) for name in names}
    for shard in left:
        records = run_shard(
            shard,
            settings,
            requests,
            strategies[shard.strategy],
            model=spec,
            hardware=machine,
            num_devices=devices,
        )
        write_shard(out, shard, digest, records)
        label = f"{shard.strategy}, batch {shard.batch_size}"
        if team.process_id == 0:
            progress(num_finished(out), len(shards), label)


def _finish(team: Team, out: Path, shards, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Process 0 joins the shards; every process says what memory it took."""
    import resource

    from moejax.bench import gather
    from moejax.units import format_bytes

    peak = format_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if team.process_id != 0:
        say(f"process {team.process_id}: peak memory {peak}")
        return []
    records = gather(out, shards, description)
    say(f"wrote {out / 'results.json'} ({len(records)} points); peak memory {peak}")
    return records


def _slots(text: str, num_experts: int) -> tuple[int, ...]:
    if text.strip() == _ALL:
        return tuple(range(1, num_experts + 1))
    return parse_ints(text, "--slots", minimum=0)
