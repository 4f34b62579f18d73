"""Writes reports/h100-model: how long Qwen1.5-MoE takes on an H100, beside transformers and bounds.

    python scripts/report_model_bench.py
    python scripts/report_model_bench.py --add NAME results.json "what to know of this run"

The first makes report.md and the figures of results.json, which holds the runs of
scripts/bench_model.py as they came; the second adds a run before that, or replaces it.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from model_bench_tables import (
    Case,
    Row,
    backend,
    ceilings_table,
    decode_table,
    gather,
    layer_s,
    prefill_table,
    runs_table,
    sweep,
    sweep_table,
    timed,
    title,
    version,
)

from moejax.cards import models_dir
from moejax.errors import BadFileError, MoejaxError
from moejax.report._palette import FAINT, GRID, INK
from moejax.results import read_json, write_json, write_text
from moejax.units import format_seconds

FOLDER = models_dir().parent / "reports" / "h100-model"
SCHEMA, RUN_SCHEMA = "moejax.bench-model-report/1", "moejax.bench-model/1"
COMMAND = "python scripts/report_model_bench.py"
TARGET_RATIO = 5
LOOKS = {
    "gather": ("#8C1C13", "X"),
    "unrolled": ("#5A1FE0", "o"),
    "dense": ("#EA5A0C", "s"),
    "rounds": ("#1F5A5A", "P"),
    "buckets": ("#8FA9A9", "v"),  # of one expert each; `rounds` took its place
    "scan": ("#9184C2", "^"),
    "ragged": ("#BE8068", "D"),
}
OURS, THEIRS = "#5A1FE0", "#EA5A0C"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the report on the speed of the model.")
    parser.add_argument(
        "--add",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "FILE", "NOTE"),
        help="a run of scripts/bench_model.py; a note may be empty",
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results.json lies")
    options = parser.parse_args(argv)
    path = options.out / "results.json"
    try:
        results = read_json(path) if path.exists() else {"schema": SCHEMA, "runs": []}
        for name, file, note in options.add:
            results["runs"] = add_run(results["runs"], name, Path(file), note)
        cases = gather(results["runs"])
        if not _targets(cases):
            raise BadFileError(
                f"{path} holds no step at batch 1 on a GPU beside transformers",
                "Add a run of scripts/bench_model.py with the parts decode and baseline.",
            )
        if options.add:
            write_json(path, results)
        draw_experts(results["runs"], options.out / "figures")
        draw_cases(cases, options.out / "figures")
        write_text(options.out / "report.md", page(results["runs"], cases))
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


def add_run(runs: list[Row], name: str, path: Path, note: str) -> list[Row]:
    """The runs with one more; another of its name gives way."""
    result = read_json(path)
    if not isinstance(result, dict) or result.get("schema") != RUN_SCHEMA:
        raise BadFileError(f"{path} is no run of the model", "Make one by scripts/bench_model.py.")
    run = {"name": name, "note": note, "result": result}
    if name in [other["name"] for other in runs]:
        return [run if other["name"] == name else other for other in runs]
    return [*runs, run]


def draw_experts(runs: Sequence[Row], folder: Path) -> None:
    """Time of a layer's experts over tokens, a panel for the GPU and one for the first CPU run."""
    swept = [run for run in runs if sweep(run)]
    shown = [
        next(run for run in swept if backend(run) == name)
        for name in dict.fromkeys(backend(run) for run in swept)
    ]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(4.7 * len(shown), 4.2), layout="constrained", squeeze=False
    )
    for axes, run in zip(panels[0], shown, strict=True):
        rows = sweep(run)
        for name in timed(run):
            points = [(n, layer_s(run, row[name])) for n, row in rows.items() if name in row]
            colour, marker = LOOKS[name]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, label=name)
        bounds = [(n, next(iter(row.values()))["bound_s"]) for n, row in rows.items()]
        axes.plot(*zip(*bounds, strict=True), "--", color=INK, label="bound")
        axes.set_title(title(run), color=INK, fontsize=10)
        axes.set(xlabel="tokens of one call", ylabel="experts of a layer", xscale="log")
        axes.set_xticks(list(rows), [f"{n}" for n in rows], rotation=45)
        axes.minorticks_off()
        _seconds_axis(axes)
        axes.legend(frameon=False, ncols=2, fontsize=8)
    _save(figure, folder, "experts")


def draw_cases(cases: Sequence[Case], folder: Path) -> None:
    """Ours, transformers' fastest and the bound for every step and prompt, run beside run."""
    places = list(dict.fromkeys((case.kind, case.size) for case in cases))
    names = list(dict.fromkeys(case.run for case in cases))
    figure, axes = plt.subplots(figsize=(8.4, 4.4), layout="constrained")
    for case in cases:
        x = places.index((case.kind, case.size)) + 0.3 * (
            names.index(case.run) - (len(names) - 1) / 2
        )
        is_first = case is next(other for other in cases if other.is_chosen)
        for samples, colour, marker, label, is_filled in (
            (next(iter(case.theirs.values())), THEIRS, "s", "transformers, its fastest", True),
            (case.samples, OURS, "o", "moejax", case.is_chosen),
        ):
            middle = float(np.median(samples))
            axes.errorbar(
                x,
                middle,
                [[middle - min(samples)], [max(samples) - middle]],
                color=colour,
                marker=marker,
                mfc=colour if is_filled else "white",
                ms=7,
                capsize=3,
                label=label if is_first else None,
                linestyle="none",
            )
        bound_s = case.ours["bound_s"]
        axes.hlines(bound_s, x - 0.11, x + 0.11, INK, linewidth=2)
    axes.plot([], [], color=INK, linewidth=2, label="bound")
    axes.plot([], [], "o", color=OURS, mfc="white", ms=7, label="moejax, experts no longer chosen")
    words = {"decode": "step, batch {}", "prefill": "prompt, {} tokens"}
    axes.set_xticks(range(len(places)), [words[kind].format(f"{n:,}") for kind, n in places])
    axes.set_ylabel("time; from left to right " + ", ".join(names))
    _seconds_axis(axes)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(
        0.7 * min(case.ours["bound_s"] for case in cases),
        2 * max(max(case.samples) for case in cases),
    )
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    _save(figure, folder, "steps")


def page(runs: Sequence[Row], cases: Sequence[Case]) -> str:
    """The report as Markdown."""
    gpu_sweeps = [run for run in runs if backend(run) == "gpu" and sweep(run)]
    cpu_sweeps = [run for run in runs if backend(run) == "cpu" and sweep(run)]
    sections = [
        "# Qwen1.5-MoE-A2.7B on one H100: steps and prompts, all weights resident",
        *_answer(cases),
        f"Made by `{COMMAND}`; every sample, with versions and commands, is in `results.json`. "
        "Weights are random, 28.6 GB in bfloat16, drawn on the device; times are measured.",
        "![Step and prompt times of moejax and transformers above the bound](figures/steps.png)",
        "*Medians; bars from the least to the largest sample, log axis. "
        "([SVG](figures/steps.svg))*",
        "## Decode",
        "A step decodes one token for every request at a context of 96 to 112, greedily, tokens "
        "fed back on the device. Pipelined: 16 steps are dispatched, then waited for, which is how "
        "transformers is timed; blocked: every token is waited for. The range is that of the "
        "samples. The bound is the bytes that a step cannot do without (dense weights, distinct "
        "chosen experts, the context's keys and values) over the read rate of the same run.",
        decode_table(cases),
        "## Prompts",
        "One prompt read up to its next token. The bound is the larger of bytes over read rate and "
        "operations over matrix product rate; only chosen experts count as operations.",
        prefill_table(cases),
        "## Rates measured in the same runs",
        ceilings_table([run for run in runs if backend(run) == "gpu"]),
        "## Where we lose, and where the time goes",
        *_analysis(gpu_sweeps, cases),
        "## Which implementation of the experts",
        "![Time of a layer's experts against tokens](figures/experts.png)",
        "*One layer's experts, from four layers called in a row with choices drawn evenly; log "
        "axes. Left medians, right the least sample. ([SVG](figures/experts.svg))*",
        *(sweep_table(run) for run in gpu_sweeps),
        "On the CPU other work ran at the same time, so the tables show the least of seven "
        "samples; small differences mean little. `mid` has 32 experts of 256 x 512, "
        "top-4; `tiny-moe` 16 of 64 x 128, top-2.",
        *(sweep_table(run) for run in cpu_sweeps),
        "## Limits",
        _limits(runs),
        "## Runs",
        runs_table(runs),
    ]
    return "\n\n".join(sections) + "\n"


def _answer(cases: Sequence[Case]) -> list[str]:
    lines = []
    for (kind, size), group in _by_place(case for case in cases if case.is_chosen):
        ours = " and ".join(format_seconds(float(np.median(case.samples))) for case in group)
        theirs = " and ".join(
            format_seconds(float(np.median(next(iter(case.theirs.values()))))) for case in group
        )
        name = f"**Decode, batch {size}**" if kind == "decode" else f"**Prompt of {size:,} tokens**"
        bounds = " and ".join(format_seconds(case.ours["bound_s"]) for case in group)
        lines.append(
            f"- {name}: {ours}; transformers {theirs}; bound {bounds}. "
            f"{' and '.join(_speed(case) for case in group)}."
        )
    first = _targets(cases)
    is_met = all(case.ratios()[0] >= TARGET_RATIO for case in first)
    verdict = (
        f"The target, at least {TARGET_RATIO}x as fast as transformers at batch 1, is "
        f"{'met in every run' if is_met else 'missed'}: "
        f"{', '.join(f'{case.ratios()[0]:.1f}x' for case in first)}; the slowest of our windows "
        f"against the fastest of theirs still gives {min(c.ratios()[1] for c in first):.1f}x."
    )
    return [verdict, "\n".join(lines)]


def _targets(cases: Iterable[Case]) -> list[Case]:
    """What the target speaks of."""
    return [case for case in cases if case.is_chosen and (case.kind, case.size) == ("decode", 1)]


def _speed(case: Case) -> str:
    ratio = case.ratios()[0]
    return f"{ratio:.1f}x as fast" if ratio >= 1 else f"**{1 / ratio:.1f}x as slow**"


def _analysis(swept: Sequence[Row], cases: Sequence[Case]) -> list[str]:
    """What the measurements say by arithmetic; there is no profile."""
    return [
        "Inferred from the times above and below by arithmetic; no profile was taken.",
        "\n".join(
            line
            for run in swept
            for tell in (_decode_line, _prefill_line)
            if (line := tell(run, cases))
        ),
    ]


def _decode_line(run: Row, cases: Sequence[Case]) -> str:
    found = [c for c in cases if (c.run, c.kind, c.size) == (run["name"], "decode", 1)]
    row = sweep(run).get(1, {}).get(found[0].ours["experts"]) if found else None
    if row is None:
        return ""
    case, num_layers = found[0], run["result"]["config"]["num_hidden_layers"]
    step_s, bound_s = float(np.median(case.samples)), case.ours["bound_s"]
    experts_s, least_s = num_layers * layer_s(run, row), num_layers * row["bound_s"]
    num_kernels = case.ours["num_kernels"]
    dispatches = ", ".join(
        f"{format_seconds(float(np.median(c.ours['dispatch']['samples'])))} in {c.run}"
        for c in _targets(cases)
    )
    return (
        f"- A step at batch 1 ({run['name']}) takes {format_seconds(step_s)} and its bytes "
        f"{format_seconds(bound_s)}. The routed experts are {format_seconds(experts_s)} of it and "
        f"{format_seconds(experts_s - least_s)} of the excess of {format_seconds(step_s - bound_s)}"
        f". The compiled step has {num_kernels} fusions, library calls and sorts, most of "
        f"them small: the excess is {format_seconds((step_s - bound_s) / num_kernels)} for each, "
        "of the order of what starting a kernel costs. The host needs nearly as long to dispatch "
        f"a step ({dispatches}), so times may move with the host from run to run, ours as well as "
        "transformers'."
    )


def _prefill_line(run: Row, cases: Sequence[Case]) -> str:
    size = max(sweep(run))
    found = [c for c in cases if (c.kind, c.size) == ("prefill", size) and c.is_chosen]
    rows = sweep(run)[size]
    if not found or found[-1].ratios()[0] >= 1 or not {"dense", "ragged"} <= set(rows):
        return ""
    config, case = run["result"]["config"], found[-1]
    num_layers, topk = config["num_hidden_layers"], config["num_experts_per_tok"]
    waste = config["num_experts"] / topk
    dense, ragged = (layer_s(run, rows[name]) for name in ("dense", "ragged"))
    flops = 6 * size * config["hidden_size"] * config["moe_intermediate_size"]
    needed_s = flops * config["num_experts"] / run["result"]["ceilings"]["flops_per_s"]
    ours_s = float(np.median(case.samples))
    theirs = ", ".join(
        f"{ours_s / np.median(c.theirs['grouped_mm']):.1f} times its "
        f"{format_seconds(float(np.median(c.theirs['grouped_mm'])))} in {c.run}"
        for c in cases
        if (c.kind, c.size) == ("prefill", size)
    )
    return (
        f"- A prompt of {size:,} tokens is where transformers' `grouped_mm` is faster: our "
        f"{format_seconds(ours_s)} are {theirs}. Our `dense` lets every expert compute every "
        f"token, {config['num_experts']}/{topk} = {waste:g}x the arithmetic of the chosen ones: "
        f"{format_seconds(dense)} a layer, of which products at the measured rate are "
        f"{format_seconds(needed_s)}, and {format_seconds(num_layers * dense)} of the "
        f"{format_seconds(ours_s)}. `jax.lax.ragged_dot`, which computes only chosen pairs, takes "
        f"{format_seconds(ragged)} a layer in jax {version(run, 'jax')}, so "
        f"{format_seconds(num_layers * ragged)}. `rounds`, a batched product over a fixed number "
        "of places per expert, repeated while some expert has more pairs, came after these runs "
        "and was not timed on a GPU yet."
    )


def _limits(runs: Sequence[Row]) -> str:
    measured = {n for run in runs if backend(run) == "gpu" for n in sweep(run)}
    asked = {n for run in runs for n in run["result"]["settings"]["sweep_tokens"]}
    lines = ["- One H100, few samples: six windows of ours, three of transformers, in each run."]
    if asked - measured:
        numbers = ", ".join(map(str, sorted(asked - measured)))
        lines.append(f"- Not timed on the GPU for want of time: the experts at {numbers} tokens.")
    lines += [
        "- Random weights may choose experts more evenly than trained ones do; at batches above 1 "
        "more distinct experts are then read than in practice.",
        "- transformers runs as installed, without `torch.compile` or CUDA graphs, which might "
        "help it at small batches.",
        "- Prompts through experts that are not resident are the engine's and not timed here.",
        "- On a CPU the best choice depends on shape and type more than on a GPU: the tables show "
        "where it costs time.",
        "- Beyond the largest number of tokens of the sweep the choice is not measured.",
    ]
    return "\n".join(lines)


def _by_place(cases: Iterable[Case]) -> list[tuple[tuple[str, int], list[Case]]]:
    """Cases of the same step or prompt together."""
    places: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        places.setdefault((case.kind, case.size), []).append(case)
    return list(places.items())


def _seconds_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: format_seconds(value))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK)


def _save(figure: Figure, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "moejax"}):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            figure.savefig(folder / f"{name}.{suffix}", dpi=160, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
