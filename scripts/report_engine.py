"""Writes reports/h100-engine: the offloaded engine on an H100, beside bounds and baselines.

    python scripts/report_engine.py
    python scripts/report_engine.py --take results.json --checks checks.json
    python scripts/report_engine.py --take results.json --out reports/h200-engine
    python scripts/report_engine.py --take fit.json ladder.json --out reports/h100-ladder

The first makes report.md and the figures of results.json; the second takes a run of
scripts/bench_engine.py before that, and what its part `check` found, also of fewer layers. Several
runs are joined: the facts of the first, the cases of all. With a run, or with --ladder, every case
is predicted and simulated and goes into the results as well.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from engine_goals import (
    Row,
    fastest,
    goals,
    is_foreseeable,
    median_s,
    pairs_of_foresight,
    pairs_with_lru,
    unmet,
)
from engine_ladder import draw_ladder, ladder_section
from matplotlib.figure import Figure

from moejax.bench import ladder, machine_profile, summarise_ladder
from moejax.cards import Hardware, models_dir
from moejax.cost import format_profile
from moejax.errors import BadFileError, MoejaxError
from moejax.report._palette import GRID, INK, LOOKS
from moejax.results import read_json, write_json, write_text
from moejax.units import format_bytes, format_ratio, format_seconds

FOLDER = models_dir().parent / "reports" / "h100-engine"
SCHEMA = "moejax.bench-engine/1"
COMMAND = "python scripts/report_engine.py"
CASE = ("strategy", "slots", "scope", "batch_size")
MARKERS = {1: "o", 4: "s", 16: "^"}
OURS, HOST, THEIRS = "#5A1FE0", "#EA5A0C", "#8C1C13"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the report on the engine.")
    parser.add_argument(
        "--take", type=Path, nargs="+", metavar="FILE", help="runs of bench_engine.py, joined"
    )
    parser.add_argument("--checks", type=Path, metavar="FILE", help="a run of its part check")
    parser.add_argument("--ladder", action="store_true", help="predict and simulate cases anew")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results.json lies")
    options = parser.parse_args(argv)
    path = options.out / "results.json"
    try:
        results = joined([read_run(file) for file in options.take or [path]])
        if options.checks is not None:
            results = with_checks(results, read_run(options.checks))
        if not results["engine"]:
            raise BadFileError(
                f"{(options.take or [path])[0]} holds no case", "Measure some first."
            )
        if "measured" in results:
            profile = machine_profile(results, command="scripts/bench_engine.py")
            write_text(options.out / "this-machine.toml", format_profile(profile))
            if options.take is not None or options.ladder:
                results = with_ladder(results, profile)
        if options.take is not None or options.checks is not None or options.ladder:
            write_json(path, results)
        draw_steps(results, options.out / "figures")
        figure = draw_ladder(results.get("ladder", ()))
        if figure is not None:
            _save(figure, options.out / "figures", "ladder")
        command = (
            COMMAND if options.out == FOLDER else f"{COMMAND} --out reports/{options.out.name}"
        )
        write_text(options.out / "report.md", page(results, command))
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


def read_run(path: Path) -> Row:
    """A run of `bench_engine.py`.

    Raises:
      BadFileError: It is something else.
    """
    results = read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise BadFileError(
            f"{path} is no run of the engine", "Make one by scripts/bench_engine.py."
        )
    return results


def joined(files: Sequence[Row]) -> Row:
    """Several runs as one: the facts of the first, the cases of all.

    Raises:
      BadFileError: They are of different models or devices.
    """
    first, *others = files
    for other in others:
        for name in ("model", "settings"):
            if other.get(name) != first.get(name):
                raise BadFileError(f"the runs differ in {name}", "Join runs that are alike.")
        if other["environment"]["device"] != first["environment"]["device"]:
            raise BadFileError("the runs differ in device", "Join runs that are alike.")
    if not others:
        return first
    rows = {
        name: [row for file in files for row in file[name]] for name in ("engine", "runs", "failed")
    }
    return {**first, **rows, "num_files": len(files)}


def with_checks(results: Row, other: Row) -> Row:
    """The results with the other run's checks; every record of a case that was checked says so."""
    layers = other["model"]["config"]["num_hidden_layers"]
    checks = [{**row, "num_layers": layers} for row in other.get("checks", [])]
    known = {tuple(row[name] for name in CASE): row for row in checks}
    records = []
    for record in results["engine"]:
        row = known.get(tuple(record[name] for name in CASE))
        if row is not None:
            record = {
                **record,
                "bit_identical": row["bit_identical"],
                "bit_identical_num_layers": layers,
            }
        records.append(record)
    return {**results, "engine": records, "checks": checks, "check_runs": other["runs"]}


def with_ladder(results: Row, profile: Hardware) -> Row:
    """The results with what the profile and the timeline say of every case."""

    def tell(number: int, num_all: int, name: str) -> None:
        print(f"simulating {number + 1} of {num_all}: {name}", file=sys.stderr)

    rows = ladder(results, profile, progress=tell)
    return {**results, "ladder": rows, "ladder_summary": summarise_ladder(rows)}


def draw_steps(results: Row, folder: Path) -> None:
    """Step time against fetched bytes: ours, the bound, and a host-driven loop on the same."""
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    rows = [row for row in results["engine"] if row["replayed"] and not is_foreseeable(row)]
    for size, marker in MARKERS.items():
        mine = [row for row in rows if row["batch_size"] == size and row["strategy"] == "lru"]
        mine = sorted(
            (row for row in mine if row["scope"] == "layer"),
            key=lambda row: row["fetched_bytes_per_step"],
        )
        if not mine:
            continue
        x = [row["fetched_bytes_per_step"] / 1e9 for row in mine]
        y = [1e3 * median_s(row) for row in mine]
        axes.plot(x, y, marker, color=OURS, ms=6, label=f"lru, batch {size}")
        bounds = [1e3 * row["bound_sum_s"] for row in mine]
        label = "sum bound" if size == rows[0]["batch_size"] else None
        # Straight lines between measured points, which a log axis bends.
        steps = np.linspace(x[0], x[-1], 200)
        axes.plot(steps, np.interp(steps, x, bounds), color=INK, linewidth=1, label=label)
    for row in rows:
        if row["strategy"] != "lru" and row["batch_size"] == 1:
            look = LOOKS[row["strategy"]]
            x, y = row["fetched_bytes_per_step"] / 1e9, 1e3 * median_s(row)
            axes.plot(x, y, look.marker, color=look.colour, ms=4, alpha=0.8)
    expert_bytes = results["sizes"]["expert_bytes"]
    host = [row for row in results["baselines"] if row["script"] == "host_driven_decode"]
    host = [row for row in host if "step_s" in row]
    if host:
        x = [row["misses_per_step"] * expert_bytes / 1e9 for row in host]
        axes.plot(x, [1e3 * median_s(row) for row in host], "X", color=HOST, label="host-driven")
    theirs = fastest(results, "transformers_decode", 1.0)
    if theirs is not None:
        axes.axhline(1e3 * median_s(theirs), color=THEIRS, linestyle=":", label="transformers")
    axes.set(xlabel="fetched, GB a step", ylabel="step, ms", yscale="log")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    _save(figure, folder, "steps")


def page(results: Row, command: str = COMMAND) -> str:
    """The report as Markdown; `command` makes it."""
    environment, model = results["environment"], results["model"]
    found = goals(results)
    sections = [
        f"# The engine on one {environment['device']}: {model['name']}, experts in host memory",
        _answer(results),
        f"Made by `{command}`; every step, with versions and commands, is in `results.json`. "
        f"{'Weights are random' if model['has_random_weights'] else 'Weights are real'}, "
        f"{model['dtype']}; {format_bytes(model['routed_bytes'])} of routed experts lie in host "
        "memory. Routing is replayed, so that hit ratios can be chosen; times are measured, from "
        "the arrival of one token to the arrival of the next.",
        "![Step time against fetched bytes, above the bound](figures/steps.png)",
        "*Medians, log axis; small marks are the other strategies. ([SVG](figures/steps.svg))*",
        "## Goals",
        _table(
            ("goal", "asked", "measured", "met"),
            [(g.what, g.limit, g.found or "not measured", _yes(g.is_met)) for g in found],
            "lllc",
        ),
        "## Steps",
        "The sum bound is what the link and the device's memory take one after the other: fetched "
        "bytes over the link's rate, and dense weights, keys and values and hit experts over the "
        "memory's, both measured in the same run. Fetched experts count at the link alone.",
        _steps_table([row for row in results["engine"] if row["replayed"]]),
        *_router_section(results),
        *_foresight_section(results),
        *_cost_section(results),
        *_baseline_section(results),
        *_rest_section(results),
        *_check_section(results),
        *ladder_section(results, _table),
        *_profile_section(results),
        "## Rates and runs",
        *_joined_words(results),
        _runs_table(results),
        *_failures(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _answer(results: Row) -> str:
    found = goals(results)
    measured = [goal for goal in found if goal.is_met is not None]
    missed = unmet(found)
    text = f"Of {len(found)} goals {len(measured)} were measured and "
    text += f"{len(measured) - len(missed)} are met."
    lines = [f"- Missed: {goal.what}: {goal.found}, asked {goal.limit}." for goal in missed]
    return "\n\n".join([text, "\n".join(lines)] if lines else [text])


def _steps_table(rows: Sequence[Row]) -> str:
    head = (
        *("strategy", "slots", "batch", "routing", "hits", "misses", "late", "fetched"),
        *("step", "p95", "sum bound", "over sum", "over max"),
    )
    return _table(head, [_step_cells(row) for row in rows], "lrrlrrrrrrrrr")


def _step_cells(row: Row) -> tuple[str, ...]:
    slots = f"{row['slots']}" if row["scope"] == "layer" else f"{row['slots']} (pool)"
    return (
        f"`{row['strategy']}`",
        slots,
        f"{row['batch_size']}",
        row["routing"],
        format_ratio(row["hit_ratio"]),
        f"{row['misses_per_step']:.1f}",
        f"{row['late_per_step']:.1f}",
        format_bytes(row["fetched_bytes_per_step"]),
        format_seconds(median_s(row)),
        format_seconds(row["step_s"]["p95"]),
        format_seconds(row["bound_sum_s"]),
        f"{median_s(row) / row['bound_sum_s']:.2f}x",
        f"{median_s(row) / row['bound_max_s']:.2f}x",
    )


def _router_section(results: Row) -> list[str]:
    rows = [row for row in results["engine"] if not row["replayed"]]
    if not rows:
        return []
    words = "Texts of random weights repeat themselves: these hit ratios say nothing of a model."
    about = words if results["model"]["has_random_weights"] else ""
    return ["## The model's own routing", about, _steps_table(rows)]


def _foresight_section(results: Row) -> list[str]:
    rows = [
        (
            f"`{row['strategy']}`",
            format_seconds(median_s(row)),
            format_seconds(median_s(base)),
            f"{median_s(base) / median_s(row):.2f}x",
            f"{row['misses_per_step']:.1f} + {row['late_per_step']:.1f}",
            f"{base['misses_per_step']:.1f}",
        )
        for row, base in pairs_of_foresight(results)
    ]
    if not rows:
        return []
    head = ("strategy", "step", "`lru`", "as fast", "misses + late", "misses of `lru`")
    return [
        "## What a prefetch hides",
        "Routing whose misses no retention avoids and any foresight can name: the same demand "
        "misses without prefetch are those of `lru`.",
        _table(head, rows, "lrrrrr"),
    ]


def _cost_section(results: Row) -> list[str]:
    rows = [
        (
            f"`{row['strategy']}`",
            row["scope"],
            format_seconds(median_s(row)),
            format_seconds(median_s(base)),
            f"{100 * (median_s(row) / median_s(base) - 1):+.1f} %",
        )
        for row, base in pairs_with_lru(results)
    ]
    if not rows:
        return []
    head = ("strategy", "scope", "step", "`lru`", "more")
    return ["## What strategies cost where nothing is missed", _table(head, rows, "llrrr")]


def _baseline_section(results: Row) -> list[str]:
    rows = [
        (
            row["system"],
            " ".join(str(row[name]) for name in ("kind", "experts", "variant") if name in row),
            f"{row['batch_size']}",
            format_ratio(row["hit_ratio"]),
            format_seconds(median_s(row)),
            f"{format_seconds(min(row['step_s']['samples']))} to "
            f"{format_seconds(max(row['step_s']['samples']))}",
        )
        for row in results["baselines"]
    ]
    if not rows:
        return []
    head = ("system", "how", "batch", "hits", "step", "range")
    return ["## Baselines, in the same call", _table(head, rows, "llrrrl")]


def _rest_section(results: Row) -> list[str]:
    parts: list[str] = []
    if contexts := results.get("contexts"):
        rows = [
            (
                f"{row['context']:,.0f}",
                format_seconds(row["step_s"]["median"]),
                "" if row["added_s"] is None else format_seconds(row["added_s"]),
                "" if row["added_bytes"] is None else format_bytes(row["added_bytes"]),
                "" if row["bound_ratio"] is None else f"{row['bound_ratio']:.2f}x",
            )
            for row in contexts
        ]
        head = ("context", "step", "added", "keys and values", "over bytes bound")
        parts += ["## Longer contexts", _table(head, rows, "rrrrr")]
    lines = []
    if prefill := results.get("prefill"):
        lines.append(
            f"- A prompt of {prefill['num_tokens']:,} tokens takes "
            f"{format_seconds(prefill['prefill_s']['median'])} with every expert on the host; the "
            f"copy alone is bound by {format_seconds(prefill['copy_bound_s'])}, the operations by "
            f"{format_seconds(prefill['compute_bound_s'])}: {prefill['bound_ratio']:.2f}x the "
            "larger."
        )
    if drift := results.get("drift"):
        lines.append(
            f"- Over {drift['num_steps']:,} steps the median of {drift['num_ends']} goes from "
            f"{format_seconds(drift['first_s'])} to {format_seconds(drift['last_s'])}."
        )
    if (memory := results.get("memory")) and memory["state_ratio"] is not None:
        planned = format_bytes(sum(memory["planned_bytes"].values()))
        lines.append(
            f"- Slots, keys and values were planned at {planned}; the device held "
            f"{memory['state_ratio']:.3f} times that, beside {format_bytes(memory['dense_bytes'])} "
            f"of dense weights. The peak of the process was {format_bytes(memory['peak_bytes'])}."
        )
    return [*parts, *(["## Prompts, many steps, memory", "\n".join(lines)] if lines else [])]


def _check_section(results: Row) -> list[str]:
    checks = results.get("checks")
    if not checks:
        return []
    layers = sorted({row.get("num_layers", 0) for row in checks})
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in checks:
        groups.setdefault((row["strategy"], row["scope"], row["batch_size"]), []).append(row)
    rows = [
        (
            f"`{strategy}`",
            scope,
            f"{size}",
            ", ".join(f"{row['slots']}" for row in group),
            f"{sum(row['num_identity_misses'] for row in group):,}",
            f"{sum(row['bit_identical'] for row in group)} of {len(group)}",
        )
        for (strategy, scope, size), group in groups.items()
    ]
    head = ("strategy", "scope", "batch", "slots", "misses meanwhile", "bit-identical")
    return [
        "## Bits",
        f"Tokens and logits of {min(row['num_identity_steps'] for row in checks)} steps against "
        "the same program with every expert in a slot, every eighth token drawn anew, on a model "
        f"of {' and '.join(map(str, layers))} layers.",
        _table(head, rows, "llrlrr"),
    ]


def _profile_section(results: Row) -> list[str]:
    if "measured" not in results:
        return []
    profile = machine_profile(results, command="scripts/bench_engine.py")
    rows = [
        (
            f"`{name}`",
            f"{constant.value:.4g} {constant.unit}".removesuffix(" 1"),
            "" if constant.standard_error is None else f"{constant.standard_error:.2g}",
            constant.kind,
            constant.source,
        )
        for name, constant in profile.constants.items()
        if constant.kind != "assumed"
    ]
    return [
        "## The profile of this machine",
        "What the cost model needs, from these steps and from sweeps of copies and of plain "
        "programs; `--hardware` takes [this-machine.toml](this-machine.toml), which also says what "
        "was not measured.",
        _table(("constant", "value", "standard error", "kind", "source"), rows, "lrrll"),
    ]


def _joined_words(results: Row) -> list[str]:
    if "num_files" not in results:
        return []
    return [
        f"These are {results['num_files']} files joined, made on machines of one kind that need "
        "not be the same machine."
    ]


def _runs_table(results: Row) -> str:
    rows = []
    for run in results["runs"]:
        ceilings, environment = run["ceilings"], run["environment"]
        versions = environment["versions"]
        rows.append(
            (
                environment["date"],
                environment["commit"][:12],
                f"jax {versions.get('jax', '')}",
                ", ".join(run["parts"]),
                f"{format_bytes(ceilings['link_bytes_per_s'])}/s",
                f"{format_bytes(ceilings['hbm_bytes_per_s'])}/s",
                f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s",
            )
        )
    head = ("date", "commit", "versions", "parts", "link", "device memory", "products")
    return _table(head, rows, "llllrrr")


def _failures(results: Row) -> list[str]:
    lines = [
        f"- {row.get('part', ', '.join(str(row[name]) for name in CASE if name in row))}: "
        f"{row['error'].strip().splitlines()[-1]}"
        for row in results["failed"]
    ]
    return ["## What failed", "\n".join(lines)] if lines else []


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], sides: str) -> str:
    rules = [{"l": "---", "r": "---:", "c": ":---:"}[side] for side in sides]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, rules, *rows])


def _yes(is_met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[is_met]


def _save(figure: Figure, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Without dates and random names the files are the same every time.
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
