"""Writes reports/h200-devices: one device and two that share the experts, measured and predicted.

    python scripts/report_devices.py --run results.json --run another.json

takes what `scripts/bench_devices.py` wrote, the run with which the page is made first; without
arguments it writes the page, the profile and the figure anew from the results.json that is there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from moejax.cards import Hardware, load_hardware, load_model, models_dir
from moejax.cost import fit_devices, format_profile
from moejax.errors import MoejaxError
from moejax.report._palette import FAINT, INK, LOOKS
from moejax.report.figures import STYLE
from moejax.report.figures._canvas import new_figure
from moejax.results import read_json, write_json, write_text
from moejax.simulate import lru_hit_curve
from moejax.trace import batch_trace, share_of
from moejax.tune import devices_problem, devices_step_s
from moejax.units import format_bytes, format_ratio, format_seconds
from moejax.workloads import WORKLOADS, make_trace

REPORTS = models_dir().parent / "reports"
FOLDER = REPORTS / "h200-devices"
BASE = REPORTS / "h200-engine" / "this-machine.toml"
SCHEMA = "moejax.devices-report/1"
WORKLOAD, SEED = "qwen1.5-moe", 0
TOKENS_PER_REQUEST = 256
PNG_DOTS_PER_INCH = 160
# What was asked: a sweep on two devices, and a plan's step.
LEAST_SPEEDUP, MOST_ERROR_RATIO = 1.8, 0.10

_ORDER = ("batch_size", "routing", "num_devices", "slots")

Row = dict[str, Any]


def main() -> int:
    """Writes the report; 0 when it is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, action="append", help="results of bench_devices.py")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    path = options.out / "results.json"
    try:
        if options.run:
            runs = [read_json(run) for run in options.run]
            write_json(path, {"schema": SCHEMA, "runs": [with_predictions(run) for run in runs]})
        results = read_json(path)
        header = "An H200 of reports/h200-engine, joined as the first run of results.json measured."
        profile = format_profile(profile_of(results["runs"][0]), header=header)
        write_text(options.out / "this-machine.toml", profile)
        draw(results["runs"][0], options.out / "figures")
        write_text(options.out / "report.md", page(results))
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


# --- predictions ------------------------------------------------------------------------------


def profile_of(run: Row) -> Hardware:
    """The profile of one H200, fitted on another day, with what joins two of them in this run."""
    (links,) = [one["links"] for one in run["engine"]["rates"].values() if "links" in one]
    sums = links["all_reduces"]
    return fit_devices(
        load_hardware(BASE),
        sums[0]["num_devices"],
        {one["all_reduce_bytes"]: float(np.median(one["all_reduce_s"]["samples"])) for one in sums},
        alone_bytes_per_s=links["alone_bytes_per_s"],
        beside_bytes_per_s=links["beside_bytes_per_s"],
    )


def with_predictions(run: Row) -> Row:
    """The run with what `moejax tune-cache --devices` predicts of every plan that was measured."""
    hardware = profile_of(run)
    plans = [plan | predicted(plan, hardware) for plan in run["engine"]["plans"]]
    return run | {"engine": run["engine"] | {"plans": plans}}


def predicted(plan: Row, hardware: Hardware) -> Row:
    """Mean step time of a plan's slots, on requests that the engine did not replay."""
    spec, batch_size = load_model("qwen1.5-moe-a2.7b"), plan["batch_size"]
    trace = make_trace(
        WORKLOADS[WORKLOAD],
        num_requests=batch_size * max(2, -(-8 // batch_size)),
        tokens_per_request=TOKENS_PER_REQUEST,
        seed=SEED,
        with_lookahead=False,
    )
    shares = [share_of(trace, device, plan["num_devices"]) for device in range(plan["num_devices"])]
    curves = [
        lru_hit_curve(batch_trace(share, batch_size), share.num_experts, keep_steps=1024)
        for share in shares
    ]
    slots = np.array(plan["slots"])
    problem = devices_problem(
        hardware,
        spec,
        [curve.step_misses_warm for curve in curves],
        budget_bytes=int(slots.sum()) * spec.expert_bytes,
        batch_size=batch_size,
        context_tokens=int(plan["mean_context"]),
    )
    step_s = float(devices_step_s(problem.times, slots))
    return {"predicted_s": step_s, "error_ratio": step_s / plan["mean_s"] - 1}


# --- page -------------------------------------------------------------------------------------


def page(results: Row) -> str:
    """The whole report."""
    first = results["runs"][0]
    sections = [
        "# Two H200s that share the experts of Qwen1.5-MoE",
        summary(results),
        "![Step time of one device and of two](figures/steps.png)\n\n*Median decode step with "
        "`lru` on the calibrated workload, slots a device as labelled; the line of each bar is "
        "the bound: what the slowest device of every layer needs for its bytes. Measured on "
        "H200s, random weights.*",
        "## What was measured",
        method(first),
        "## Steps",
        steps_table(first),
        "## Plans of `moejax tune-cache --devices`",
        plans_text(results),
        *[plans_table(number, run) for number, run in enumerate(results["runs"])],
        "## The same tokens",
        bits(first),
        "## Sweeps of the simulator",
        sweeps(first),
        "## Made again by",
        made_again(results),
    ]
    return "\n\n".join(sections) + "\n"


def summary(results: Row) -> str:
    """What two devices buy, in a paragraph."""
    first = results["runs"][0]
    missed = [
        " and ".join(f"{speedup(run, size, 0):.2f}" for run in results["runs"]) for size in (1, 16)
    ]
    sweep = next(row for row in first["sweep"][::-1] if row["strategy"] == "all")
    errors = all_errors(results)
    return (
        "With the experts dealt out between two devices, each with slots and a link of its own, a "
        f"decode step in which everything is missed is {missed[0]} times as fast at batch 1 and "
        f"{missed[1]} times at batch 16, in {len(results['runs'])} run(s) on machines of the same "
        "kind. It is not twice: a layer waits for the "
        "device with more misses, and what is no routed expert is computed twice. Where every "
        "expert has a slot, one device is faster at batch 1: there is nothing to fetch, and "
        "adding the answers up takes "
        f"{format_seconds(all_reduce_s(first))} a layer. The simulator's sweep is "
        f"{sweep['speedup_ratio']:.2f} times as fast on two devices, with the same bits. "
        f"The cost model of `moejax tune-cache` predicts the mean steps of {len(errors)} measured "
        f"plans, of one device and of two, to {format_ratio(max(errors))} at worst, "
        f"{format_ratio(float(np.median(errors)))} in the median."
    )


def all_errors(results: Row) -> list[float]:
    """How far the prediction of every plan of every run is off."""
    plans = [plan for run in results["runs"] for plan in run["engine"]["plans"]]
    return [abs(plan["error_ratio"]) for plan in plans]


def speedup(run: Row, batch_size: int, slots: int) -> float:
    """Step of one device over that of two, both with so many slots a layer each."""
    times = {
        case["num_devices"]: case["step_s"]["median"]
        for case in run["engine"]["cases"]
        if (case["batch_size"], case["slots"], case["routing"]) == (batch_size, slots, _drawn(run))
    }
    return times[1] / times[2]


def all_reduce_s(run: Row) -> float:
    """Of the smallest vector."""
    (links,) = [one["links"] for one in run["engine"]["rates"].values() if "links" in one]
    return float(np.median(links["all_reduces"][0]["all_reduce_s"]["samples"]))


def method(run: Row) -> str:
    """Machine, model and what was replayed."""
    rates, environment = run["engine"]["rates"], run["environment"]
    links = rates["2"]["links"]
    return (
        f"Measured on {environment['device']}s of one host, {environment['date'][:10]}, commit "
        f"{environment['commit'][:7]}, jax {environment['versions']['jax']}. Qwen1.5-MoE-A2.7B "
        "with random weights in bfloat16, all experts in pinned host memory, expert `e` of every "
        "layer on device `e % 2`; attention, router and shared expert on both. A step is one "
        "program on both devices; it asks the host nothing. Routing is replayed: requests of the "
        f"workload `{WORKLOAD}`, or as many different experts as the batch can demand, which then "
        "always hit (`all hits`). A link copies "
        f"{format_bytes(links['alone_bytes_per_s'])}/s alone and "
        f"{format_bytes(links['beside_bytes_per_s'])}/s beside the other. The bound adds up, layer "
        "by layer, what the slower device needs for the bytes it fetches and for its resident "
        "experts, and what both read alike, at the rates that one device reached alone just "
        "before: "
        + ", ".join(
            f"{format_bytes(one['ceilings']['link_bytes_per_s'])}/s of link and "
            f"{format_bytes(one['ceilings']['hbm_bytes_per_s'])}/s of memory for steps of {count}"
            for count, one in rates.items()
        )
        + "."
    )


def steps_table(run: Row) -> str:
    """Every case."""
    rows = [
        (
            str(case["batch_size"]),
            str(case["num_devices"]),
            str(case["slots"]),
            "workload" if case["routing"] == _drawn(run) else "all hits",
            format_ratio(case["hit_ratio"]),
            format_bytes(case["fetched_bytes_per_step"]),
            format_seconds(case["step_s"]["median"]),
            format_seconds(case["step_s"]["p95"]),
            f"{case['bound_sum_ratio']:.2f}",
            "equal" if case["counts_equal"] else case["count_difference"],
        )
        for case in sorted(
            run["engine"]["cases"],
            key=lambda case: tuple(case[name] for name in _ORDER),
        )
    ]
    names = ("batch", "devices", "slots a layer, each", "routing", "hits", "fetched a step")
    return _table((*names, "step, median", "95th", "over the bound", "counts"), rows) + (
        "\n\nCounts: hits and misses of every device, step and layer beside the simulator's on "
        "that device's share of the routing."
    )


def plans_text(results: Row) -> str:
    """What was predicted, from what."""
    worst = max(all_errors(results))
    verdict = "met" if worst <= MOST_ERROR_RATIO else "not met"
    return (
        "The profile of one device is the one fitted on another H200 (`reports/h200-engine`); "
        "from a run over two come only the time of an all-reduce and how fast links are side by "
        "side, each measured alone (`moejax fit results.json --base "
        "reports/h200-engine/this-machine.toml`). The prediction rests on other requests of the "
        f"workload than those that were replayed. Asked: at most {format_ratio(MOST_ERROR_RATIO)} "
        f"off; worst {format_ratio(worst)}: {verdict}."
    )


def plans_table(number: int, run: Row) -> str:
    """Predicted beside measured."""
    links = run["engine"]["rates"]["2"]["links"]
    beside = links["beside_bytes_per_s"] / links["alone_bytes_per_s"]
    rows = [
        (
            str(plan["num_devices"]),
            str(plan["batch_size"]),
            plan["plan"].removesuffix(".json").rpartition("-")[2],
            format_ratio(plan["hit_ratio"]),
            format_seconds(plan["predicted_s"]),
            format_seconds(plan["mean_s"]),
            f"{100 * plan['error_ratio']:+.1f} %",
        )
        for plan in run["engine"]["plans"]
    ]
    header = ("devices", "batch", "budget, each", "hits", "predicted", "measured, mean", "error")
    title = f"Run {number + 1} of results.json, links side by side at {beside:.2f} of one alone:"
    return f"{title}\n\n{_table(header, rows)}"


def bits(run: Row) -> str:
    """Whether they compute the same."""
    compared = run["engine"]["compared"]
    is_exact = all(row["is_identical_in_order"] for row in compared)
    is_same = all(row["is_identical"] for row in run["engine"]["logits"])
    changed = [row for row in compared if row["rms_difference_ratio"]]
    same, all_ = (sum(row[name] for row in changed) for name in ("same_tokens", "num_tokens"))
    sizes = " and ".join(str(row["batch_size"]) for row in changed)
    return (
        f"Logits of {run['engine']['logits'][0]['num_steps']} replayed steps with two slots a "
        f"layer and with all are {'identical' if is_same else 'NOT equal'} to the bit, on one "
        "device and on two, at every batch size. Two devices add up each its own experts in the "
        "order of their numbers, then the two sums, then the residual stream. One device that "
        f"adds in that order says {'the same to the bit' if is_exact else 'SOMETHING ELSE'}. In "
        f"its usual order, one after another, bits differ at batches of {sizes}, and {same} of "
        f"{all_} best tokens of the random weights are the same; elsewhere both orders agree."
    )


def sweeps(run: Row) -> str:
    """What more devices buy the simulator."""
    rows = [
        (
            part,
            f"`{row['strategy']}`",
            str(row["num_devices"]),
            format_seconds(row["median_s"]),
            format_seconds(min(row["run_s"]["samples"])) if "run_s" in row else "",
            f"{row['speedup_ratio']:.2f}",
            "yes" if row["is_identical"] else "NO",
        )
        for part in ("sweep", "timeline")
        for row in run[part]
    ]
    header = ("part", "strategy", "devices", "median", "fastest", "times as fast", "same bits")
    size = next(row for row in run["sweep"] if "num_lanes" in row)
    return (
        f"`sweep`: ranks of {size['num_lanes']} traces of {size['num_layers']} layers x "
        f"{size['num_experts']} experts x {size['num_steps']:,} steps at every capacity; "
        f"`timeline`: as many with a clock. Compiled before, samples of one and two devices in "
        f"turns. Asked of `sweep`: {LEAST_SPEEDUP} times on two. Of the timeline nothing was "
        "asked; why `intelligent` gains more than two times there is not known.\n\n"
        f"{_table(header, rows)}"
    )


def made_again(results: Row) -> str:
    """Commands."""
    runs = results["runs"]
    plans = runs[0]["engine"]["plans"]
    contexts = dict(sorted((plan["batch_size"], int(plan["mean_context"])) for plan in plans))
    notes = [run["note"] for run in runs if "note" in run]
    return " ".join(
        [
            "```sh\n"
            "moejax tune-cache --budget 8GB --devices 2 --batch-size 4 --context-tokens 144 \\\n"
            "  --hardware reports/h200-engine/this-machine.toml --out d2-b4-8GB.json\n"
            "python scripts/bench_devices.py --out results.json --devices 1,2 "
            "--parts engine,sweep,timeline --plans d*.json\n"
            "python scripts/report_devices.py --run results.json\n"
            "```\n\n"
            "The first command stands for one a plan of the tables above; contexts were",
            ", ".join(f"{tokens} tokens at batch {size}" for size, tokens in contexts.items())
            + ".",
            "The runs are of commits",
            ", ".join(run["environment"]["commit"][:7] for run in runs) + ".",
            *notes,
        ]
    )


def _drawn(run: Row) -> str:
    return next(c["routing"] for c in run["engine"]["cases"] if c["routing"].startswith(WORKLOAD))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- figure -----------------------------------------------------------------------------------


def draw(run: Row, folder: Path) -> None:
    """Writes the figure as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with style.context(dict(STYLE), after_reset=True):
        figure = _steps(run)
        for kind, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            figure.savefig(folder / f"steps.{kind}", dpi=PNG_DOTS_PER_INCH, metadata=metadata)


def _steps(run: Row) -> Figure:
    """A panel a batch size: bars of one device and of two, a line at each bound."""
    figure = new_figure(2.8)
    sizes = sorted({case["batch_size"] for case in run["engine"]["cases"]})
    for axes, size in zip(figure.subplots(1, len(sizes)), sizes, strict=True):
        cases = [case for case in run["engine"]["cases"] if case["batch_size"] == size]
        bars = sorted(
            (case for case in cases if case["routing"] == _drawn(run)),
            key=lambda case: (case["num_devices"], case["slots"]),
        )
        for place, case in enumerate(bars):
            count = case["num_devices"]
            label = "one device" if count == 1 else "two devices"
            look = LOOKS["lru" if count == 1 else "gate_look"]
            axes.bar(place, 1e3 * case["step_s"]["median"], 0.75, color=look.colour, label=label)
            ends, bound_ms = (place - 0.42, place + 0.42), 1e3 * case["bound_sum_s"]
            axes.plot(ends, (bound_ms, bound_ms), color=INK, linewidth=1.2)
        axes.set_xticks(range(len(bars)), [str(case["slots"]) for case in bars])
        axes.set_title(f"batch {size}")
        axes.set_xlabel("slots of a layer, each")
        axes.grid(axis="y", color=FAINT, linewidth=0.3)
        axes.set_axisbelow(True)
    first = figure.axes[0]
    first.set_ylabel("decode step, ms")
    handles, labels = first.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    first.legend(named.values(), named.keys(), frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
