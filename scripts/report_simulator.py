"""Writes reports/simulator: how fast the ranks are, beside what, and what bounds them.

    python scripts/report_simulator.py --cpu cpu.json --gpu gpu.json

takes what `scripts/bench_simulator.py -o json` printed, and `--experiment experiment.json` what
`scripts/bench_experiment.py -o json` printed; without arguments it writes the page and the figure
anew from the results.json that is there.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from moejax.cards import models_dir
from moejax.errors import MoejaxError
from moejax.report._palette import FAINT, INK, LOOKS
from moejax.report.figures import STYLE
from moejax.report.figures._canvas import new_figure
from moejax.results import read_json, write_json, write_text
from moejax.units import format_bytes, format_ratio, format_seconds

FOLDER = models_dir().parent / "reports" / "simulator"
SCHEMA = "moejax.simulator-report/1"
PNG_DOTS_PER_INCH = 160
STRATEGIES = 5
STAGES = {
    "score": "what the strategy says of each expert",
    "rank": "scores to bit planes of ranks",
    "select": "hits, and what each capacity keeps",
}

Row = dict[str, Any]


def main() -> int:
    """Writes the report; 0 when it is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=Path, help="results of all parts on a CPU")
    parser.add_argument("--gpu", type=Path, help="results of the part `fill` on a GPU")
    parser.add_argument("--experiment", type=Path, help="results of the experiment on a CPU")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    path = options.out / "results.json"
    try:
        results = read_json(path) if path.exists() else {"schema": SCHEMA}
        for name in ("cpu", "gpu", "experiment"):
            if source := getattr(options, name):
                results[name] = results.get(name, {}) | read_json(source)
        write_json(path, results)
        results = read_json(path)
        draw(results, options.out / "figures")
        write_text(options.out / "report.md", page(results))
    except MoejaxError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


# --- goals ------------------------------------------------------------------------------------


def goals(results: Row) -> list[tuple[str, str, str, bool]]:
    """What was asked, the bar, the figure, and whether it is met."""
    cpu = results["cpu"]
    small = cpu["records"][0]
    eight, every = small["sweeps"]
    growth, fill = cpu["growth"], results["gpu"]["fill"]
    ratios = growth["doubling_ratios"]
    rate = fill["request_capacities_per_s"]
    rows = [("first call, compiling, 8 capacities", 3.0, eight["first_call_s"])]
    for sweep, most_s in ((eight, 1.0), (every, 1.2)):
        rows.append(
            (f"five strategies x {sweep['num_capacities']} capacities", most_s, sweep["ours_s"])
        )
    rows.append(("LRU, every capacity", 0.08, small["lru_all_s"]))
    found = [
        (text, f"at most {format_seconds(bar)}", format_seconds(value), value <= bar)
        for text, bar, value in rows
    ]
    for sweep, least in ((eight, (3.0, 1.5)), (every, (15.0, 8.0))):
        for name, bar in zip(("one_core", "two_processes"), least, strict=True):
            ratio, peer = sweep[f"ratio_{name}"], name.replace("_", " ")
            text = f"libcachesim on {peer} / ours, {sweep['num_capacities']} capacities"
            found.append((text, f"at least {bar:g}x", f"{ratio:.1f}x", ratio >= bar))
    peak, most = growth["peak_rss_bytes"], 2e9
    experiment = results["experiment"]
    num_points, warm_s = experiment["num_points"], experiment["warm"]["experiment_s"]["median"]
    num_cells = sum(record["cells"] for record in cpu["records"])
    num_equal = sum(record["cells_equal"] for record in cpu["records"])
    return [
        *found,
        ("cells equal to libcachesim or plain numpy", "all", f"{num_equal:,} of {num_cells:,}",
         num_equal == num_cells),
        ("peak memory of 100 million requests", "under 2 GB", format_bytes(peak), peak < most),
        ("time of twice as many requests", "1.9x to 2.1x",
         " and ".join(f"{ratio:.2f}x" for ratio in ratios),
         all(1.9 <= ratio <= 2.1 for ratio in ratios)),
        ("request-capacities a second on one GPU", "at least 20 G", f"{rate / 1e9:.1f} G",
         rate >= 20e9),
        (f"{num_points}-point experiment on the timeline, warm", "at most 15.0 s",
         format_seconds(warm_s), warm_s <= 15.0),
    ]  # fmt: skip


# --- the page ---------------------------------------------------------------------------------


def page(results: Row) -> str:
    """The report in Markdown."""
    cpu, gpu = results["cpu"], results["gpu"]
    rows = goals(results)
    met = sum(is_met for *_, is_met in rows)
    parts = [
        "# How fast the simulators are",
        "Exact hit counts of every strategy and cache size, without a clock, and the experiment of "
        f"`moejax bench` with one: **{met} of {len(rows)}** figures that were asked for are met.",
        "![Request-capacities a second](figures/throughput.png)",
        "*A request at one capacity is what a simulator works through; libcachesim replays one "
        "policy and one size a pass. Fastest samples of one run each.*",
        "## What was asked",
        _table(
            ("figure", "asked", "measured", "met"),
            [(*row[:3], "yes" if row[3] else "**no**") for row in rows],
            "lrrc",
        ),
        "## Sweeps on a CPU, beside libcachesim",
        _sweeps(cpu),
        f"Peer: {cpu['peer']}, in C, with the policies LRU, LFU, FIFO, SIEVE and Belady, given the "
        "requests of a layer one after another. Ours: lru, lfu, oracle, top_k and scores by "
        "succession within a layer, a token's experts as one set, from ids to counts. Cells (a "
        "strategy, layer and capacity) are compared with plain numpy set at a time, and LRU and "
        "Belady with the peer where both mean the same: one request an event.",
        "## Long traces",
        _growth(cpu["growth"]),
        "## What fills a GPU",
        _fill(gpu["fill"]),
        "## Where the time goes",
        "Every stage by itself, `lru`; in a replay the next block's scores and ranks are counted "
        "while this block's selects run.",
        _stages({"CPU": cpu["fill"], "GPU": gpu["fill"]}),
        _bounds(gpu["fill"]),
        "## The experiment on the timeline",
        _experiment(results["experiment"]),
        "## Method",
        _method(results),
    ]
    return "\n\n".join(parts) + "\n"


def _sweeps(cpu: Row) -> str:
    rows = []
    for record in cpu["records"]:
        for sweep in record["sweeps"]:
            rate = STRATEGIES * record["num_requests"] * sweep["num_capacities"] / sweep["ours_s"]
            rows.append(
                (
                    f"{record['num_layers']} x {record['num_experts']}, top-{record['topk']}",
                    sweep["num_capacities"],
                    format_seconds(sweep["first_call_s"]),
                    format_seconds(sweep["ours_s"]),
                    format_seconds(max(sweep["ours_samples_s"])),
                    f"{rate / 1e6:,.0f} M",
                    format_seconds(sweep["libcachesim_one_core_s"]),
                    f"{sweep['ratio_one_core']:.1f}x",
                    format_seconds(sweep["libcachesim_two_processes_s"]),
                    f"{sweep['ratio_two_processes']:.1f}x",
                )
            )
    head = ("layers x experts", "capacities", "first call", "ours", "slowest", "a second",
            "one core", "ratio", "two processes", "ratio")  # fmt: skip
    return _table(head, rows, "lrrrrrrrrr")


def _growth(growth: Row) -> str:
    rows = [
        (
            f"{row['num_requests'] / 1e6:,.0f} million",
            format_seconds(row["ours_s"]),
            format_seconds(max(row["ours_samples_s"])),
            f"{ratio:.2f}x" if ratio else "",
        )
        for row, ratio in zip(growth["lengths"], [None, *growth["doubling_ratios"]], strict=True)
    ]
    strategies = " and ".join(growth["strategies"])
    return "\n\n".join(
        [
            f"{strategies}, {growth['num_capacities']} capacities, {growth['num_layers']} layers "
            f"of {growth['num_experts']} experts, read from a file as it goes. The process, the "
            "sweeps before included, peaks "
            f"at {format_bytes(growth['peak_rss_bytes'])}.",
            _table(("requests", "fastest", "slowest", "twice as many"), rows, "rrrr"),
        ]
    )


def _fill(fill: Row) -> str:
    rows = [
        (
            row["strategy"],
            format_seconds(row["first_call_s"]),
            format_seconds(row["ours_s"]),
            format_seconds(max(row["ours_samples_s"])),
            f"{row['request_capacities_per_s'] / 1e9:.1f} G",
        )
        for row in fill["strategies"]
    ]
    head = ("strategy", "first call", "fastest", "slowest", "request-capacities a second")
    return "\n\n".join(
        [
            f"{fill['num_lanes']} traces side by side, {fill['num_layers']} layers of "
            f"{fill['num_experts']} experts, top-{fill['topk']}, {fill['num_steps']:,} steps, all "
            f"{fill['num_capacities']} capacities: {fill['num_request_capacities'] / 1e9:.2f} G "
            f"request-capacities a strategy. {fill['cells_equal']:,} of {fill['cells']:,} cells of "
            "the first steps equal plain numpy.",
            _table(head, rows, "lrrrr"),
        ]
    )


def _experiment(experiment: Row) -> str:
    warm, cold = experiment["warm"], experiment["cold"]
    names = {
        "experiment_s": "**the experiment**",
        **{f"parts_s.{part}": part for part in cold["parts_s"]},
        "process_s": "the whole process, imports and profile included",
        "experiment_cpu_s": "processor time of the experiment",
    }
    flat = cold | {f"parts_s.{part}": time_s for part, time_s in cold["parts_s"].items()}
    rows = [
        (
            text,
            *(format_seconds(warm[key][which]) for which in ("median", "min", "max")),
            format_seconds(flat[key]),
        )
        for key, text in names.items()
    ]
    are_equal = "the same to the last bit" if experiment["records_equal"] else "**not** the same"
    loads = [one["load_before"] for one in experiment["warm_samples"]]
    return "\n\n".join(
        [
            "Five strategies, five batch sizes and ten draws of requests, as `moejax bench` runs "
            f"them by default: {experiment['num_points']} points of 24 layers of 60 experts and "
            "160 steps. Each sample is a new process; warm ones find the compiled programs on "
            f"disk, the cold one compiles them. The records of all are {are_equal}. While one "
            "strategy runs the next is loaded, so a part is the time from the end of the one "
            f"before. {len(loads)} warm samples; the machine's load before them was "
            f"{min(loads):.1f} to {max(loads):.1f}.",
            _table(("part", "median", "fastest", "slowest", "cold"), rows, "lrrrr"),
        ]
    )


def _stages(fills: dict[str, Row]) -> str:
    rows = []
    for name, text in STAGES.items():
        cells = []
        for fill in fills.values():
            stages = fill["stages"]
            total_s = sum(stages[f"{stage}_s"] for stage in STAGES)
            time_s = stages[f"{name}_s"]
            cells += [format_seconds(time_s), f"{100 * time_s / total_s:.0f} %"]
        rows.append((name, text, *cells))
    head = ("stage", "what", *(part for fill in fills for part in (fill, "share")))
    return _table(head, rows, "ll" + "rr" * len(fills))


def _bounds(fill: Row) -> str:
    fastest_s = min(row["ours_s"] for row in fill["strategies"])
    bound_s = max(fill["operation_bound_s"], fill["memory_bound_s"])
    bytes_per_s = format_bytes(fill["read_write_bytes_per_s"])
    return (
        f"No program of this form is faster on the GPU than its word operations, "
        f"{format_seconds(fill['operation_bound_s'])} at the {fill['operations_per_s'] / 1e12:.1f} "
        f"T a second measured in the same run ({fill['select_operations']} a select, and two for "
        "every pair of experts ranked), nor than the bytes of scores and rank planes, "
        f"{format_seconds(fill['memory_bound_s'])} at {bytes_per_s}/s. The fastest strategy takes "
        f"{format_seconds(fastest_s)}: {format_ratio(bound_s / fastest_s)} of the greater bound. "
        "What is left is in the ranks, which a GPU counts pair by pair through memory, and in "
        "launching a scan's programs at every step of the scores."
    )


def _method(results: Row) -> str:
    lines = []
    for name, text in (("cpu", "CPU"), ("gpu", "GPU"), ("experiment", "Experiment, CPU")):
        environment = results[name]["environment"]
        versions = environment["versions"]
        lines.append(
            f"- {text}: {environment['device']}, {environment['num_cpus']} processors, Python "
            f"{versions['python']}, jax {versions['jax']}, commit "
            f"`{environment['commit'][:12]}`, {environment['date']}:\n"
            f"  `python scripts/{' '.join(environment['argv'])}`"
        )
    lines += [
        "- Times are of whole calls, from ids in memory (long traces: in a file) to counts; the "
        "fastest and slowest of the samples stand in the tables, all of them in results.json.",
        "- Traces are drawn from a fixed seed, with skewed popularity and topics that move on; "
        "they are not recorded routing, and their hit ratios mean nothing.",
        "- This page is written from results.json by `python scripts/report_simulator.py`.",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], sides: str) -> str:
    rules = [{"l": "---", "r": "---:", "c": ":---:"}[side] for side in sides]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, rules, *rows])


# --- the figure -------------------------------------------------------------------------------


def draw(results: Row, folder: Path) -> None:
    """Writes the figure as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with style.context(dict(STYLE), after_reset=True):
        figure = throughput(results)
        for kind, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            path = folder / f"throughput.{kind}"
            figure.savefig(path, dpi=PNG_DOTS_PER_INCH, metadata=metadata)


def throughput(results: Row) -> Figure:
    """Request-capacities a second: the peer, ours on the same cores, ours on a GPU."""
    record, fill = results["cpu"]["records"][0], results["gpu"]["fill"]
    bars = []
    for sweep in record["sweeps"]:
        number = sweep["num_capacities"]
        work = STRATEGIES * record["num_requests"] * number
        for name in ("one_core", "two_processes"):
            text = f"libcachesim, {name.replace('_', ' ')}, {number} capacities"
            bars.append((text, work / sweep[f"libcachesim_{name}_s"], FAINT))
        bars.append(
            (f"moejax, two cores, {number} capacities", work / sweep["ours_s"], LOOKS["lru"].colour)
        )
    device = results["gpu"]["environment"]["device"].replace("NVIDIA ", "").split(" ")[0]
    text = f"moejax, one {device}, {fill['num_lanes']} traces x {fill['num_capacities']} capacities"
    bars.append((text, fill["request_capacities_per_s"], LOOKS["intelligent"].colour))
    figure = new_figure(2.6)
    axes = figure.subplots()
    names, rates, colours = zip(*reversed(bars), strict=True)
    axes.barh(names, rates, color=colours, height=0.7)
    axes.set_xscale("log")
    axes.set_xlim(1e7, 10 ** math.ceil(math.log10(max(rates)) + 0.4))
    for place, rate in enumerate(rates):
        shown = f"{rate / 1e9:.1f} G" if rate >= 1e9 else f"{rate / 1e6:.0f} M"
        axes.text(rate * 1.1, place, shown, va="center", color=INK)
    axes.set_xlabel("request-capacities a second")
    axes.grid(axis="y", visible=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
