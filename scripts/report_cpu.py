"""Writes reports/cpu-tiny-moe: the engine on a CPU, predicted, simulated and measured.

    python scripts/report_cpu.py
    python scripts/report_cpu.py --measure

The first makes report.md and the figure of results.json; the second measures before that, on this
machine and with the weights of tiny-moe, in some ten minutes: `moejax bench --engine --ladder` and
`moejax validate --against`, which a reader can run alone for fewer strategies.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from engine_ladder import draw_ladder, ladder_section

from moejax.cards import load_hardware, models_dir
from moejax.cli import main as moejax
from moejax.errors import BadFileError, MoejaxError
from moejax.results import read_json, write_json, write_text
from moejax.units import format_bytes, format_ratio, format_seconds

Row: TypeAlias = dict[str, Any]

FOLDER = models_dir().parent / "reports" / "cpu-tiny-moe"
COMMAND = "python scripts/report_cpu.py"
STRATEGIES = "on_demand,oracle,multi_look,top_k,intelligent,lru,lfu,gate_look"
BATCH_SIZES = "1,4,16"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the report on the engine on a CPU.")
    parser.add_argument("--measure", action="store_true", help="measure here before that")
    parser.add_argument("--note", help="what else is to be known of the measurement, kept with it")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results.json lies")
    options = parser.parse_args(argv)
    if options.measure and (code := measure(options.out)):
        return code
    try:
        results = read_results(options.out / "results.json")
        if options.note is not None:
            results["note"] = options.note
            write_json(options.out / "results.json", results)
        draw(results["ladder"], options.out / "figures")
        write_text(options.out / "report.md", page(results, options.out))
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


def measure(folder: Path) -> int:
    """Measures, predicts and simulates; the exit code of the first command that fails."""
    options = ["--strategies", STRATEGIES, "--batch-sizes", BATCH_SIZES]
    code = moejax(["bench", "--engine", "--ladder", *options, "--out", str(folder)])
    return code or moejax(
        ["validate", "--against", str(folder), "--out", str(folder / "results.json")]
    )


def read_results(path: Path) -> Row:
    """A run of the engine with its ladder.

    Raises:
      BadFileError: It is something else.
    """
    results = read_json(path)
    if not isinstance(results, dict) or not results.get("ladder"):
        raise BadFileError(f"{path} holds no ladder", f"Make one with `{COMMAND} --measure`.")
    return results


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Errors of the predictions with their intervals, as SVG and PNG."""
    figure = draw_ladder(rows)
    assert figure is not None
    folder.mkdir(parents=True, exist_ok=True)
    # Without dates and random names the files are the same every time.
    with plt.rc_context({"svg.hashsalt": "ladder"}):
        figure.savefig(folder / "ladder.svg", metadata={"Date": None})
        figure.savefig(folder / "ladder.png", dpi=160, metadata={"Software": None})
    plt.close(figure)


def page(results: Row, folder: Path = FOLDER) -> str:
    """The report as Markdown."""
    environment, model = results["environment"], results["model"]
    weights = "drawn at random" if model["has_random_weights"] else "its own"
    sections = [
        f"# The engine on a CPU: {model['name']}, predicted, simulated and measured",
        _answer(results),
        f"Made by `{COMMAND} --measure`, which runs `moejax bench --engine --ladder` and `moejax "
        f"validate --against`; measured on {environment['device']}, {environment['num_cpus']} "
        f"cores shared with other work, {environment['date'][:10]}, jax "
        f"{environment['versions']['jax']}. Weights are {weights}, {model['dtype']}. A CPU has no "
        "link: slots and experts lie in the same memory, a miss costs a copy within it, and the "
        "engine is the one in plain JAX. Routing is replayed: made for chosen hit ratios where the "
        "fit sees it, recorded from this model where it does not. So the report checks counts, "
        "laws and the tools on hardware that everybody has, and says nothing of any GPU.",
        "## How much the times scatter",
        " ".join([_scatter(results), results.get("note", "")]).strip(),
        *ladder_section(results, table),
        "There is no roofline of a datasheet here: the processor is a share of a server's, for "
        "which no vendor states rates.",
        "## Where the prediction is off",
        _causes(results),
        *_groups(results["ladder"]),
        "## The profile of this machine",
        "`--hardware` takes [this-machine.toml](this-machine.toml), which also says what was not "
        "measured.",
        _constants(folder / "this-machine.toml"),
    ]
    return "\n\n".join(sections) + "\n"


def _answer(results: Row) -> str:
    found = scatter(results)
    summary = results["ladder_summary"]
    predicted, two = (summary["errors"][name] for name in ("predicted", "two_constants"))
    return (
        f"Of {summary['num_cases']} cases that the fit did not see, "
        f"{summary['num_counts_equal']} count what the simulator counts, event by event. "
        f"Predictions are off by {format_ratio(predicted['median_ratio'])} in the median and "
        f"{format_ratio(predicted['worst_ratio'])} at worst, where the rates of copies and memory "
        f"alone are off by {format_ratio(two['median_ratio'])}. The H100's bars, 5 % and 15 %, are "
        f"{_met(predicted)}. Where every step does the same, the middle half of a case's steps "
        f"spans {format_ratio(found['spread_ratio'])} of its median."
    )


def _met(errors: Row) -> str:
    is_met = errors["median_ratio"] <= 0.05 and errors["worst_ratio"] <= 0.15
    return "met" if is_met else "not met"


def scatter(results: Row) -> dict[str, Any]:
    """How far equal steps repeat, by quartiles.

    Equal are the steps of a case that all miss as many experts.
    """
    spreads = []
    for row in results["engine"]:
        steps = row["steps"]
        if len({*zip(steps["hits"], steps["misses"], steps["late"], strict=True)}) == 1:
            low_s, middle_s, high_s = np.percentile(row["step_s"]["samples"], [25, 50, 75])
            spreads.append(float((high_s - low_s) / middle_s))
    return {
        "num_steady": len(spreads),
        "spread_ratio": float(np.median(spreads)),
        "worst_spread_ratio": max(spreads),
    }


def _scatter(results: Row) -> str:
    found = scatter(results)
    num_steps = results["settings"]["num_steps"]
    return (
        f"A case is {num_steps} steps of one to some ten milliseconds, and its median counts. In "
        f"{found['num_steady']} cases all steps hit and miss as many experts; of these the middle "
        f"half of the steps spans {format_ratio(found['spread_ratio'])} of the median in the "
        f"median case and {format_ratio(found['worst_spread_ratio'])} in the worst."
    )


def _causes(results: Row) -> str:
    """What the law does not know, with the cases that show it."""

    def step_s(strategy: str, batch_size: int, routing: str) -> float:
        rows = (row for row in results["engine"] if row["routing"].startswith(routing))
        kind = (strategy, batch_size)
        row = next(row for row in rows if (row["strategy"], row["batch_size"]) == kind)
        return row["step_s"]["median"]

    hits_s, misses_s = (step_s("lru", 1, f"{share} % hits") for share in (100, 0))
    unkept_s = step_s("on_demand", 1, "100 % hits")
    alone, crowded = (
        format_seconds(step_s("oracle", size, "tiny-moe") - step_s("lfu", size, "tiny-moe"))
        for size in (1, 16)
    )
    return (
        "The law lets every miss cost the same and a strategy cost the same whatever the batch. "
        "This engine breaks both. A step of `lru` takes "
        f"{format_seconds(hits_s)} if nothing is missed and {format_seconds(misses_s)} if "
        f"everything is, and then every expert is written into a slot; one of `on_demand`, which "
        f"misses as much and keeps nothing, takes {format_seconds(unkept_s)}. So the write costs, "
        "and the fit to `lru` charges it to misses of strategies that keep less: `on_demand`, "
        f"`top_k`, `lfu`, few slots. And with 8 slots `oracle` takes {alone} longer than `lfu` at "
        f"batch 1 and {crowded} at batch 16. On an H100, with kernels of its own and larger "
        "experts, the same law was off far less ([report](../h100-ladder/report.md)); here an "
        f"expert is {format_bytes(results['sizes']['expert_bytes'])}."
    )


def _groups(rows: Sequence[Row]) -> list[str]:
    def grouped(name: str, key: Callable[[Row], Any]) -> str:
        held_out = [row for row in rows if row["is_held_out"]]
        cells = []
        for value in dict.fromkeys(map(key, held_out)):
            mine = [row for row in held_out if key(row) == value]
            errors = [row["error_ratio"] for row in mine]
            cells.append(
                (
                    value,
                    f"{len(mine)}",
                    f"{100 * float(np.median(errors)):+.1f} %",
                    format_ratio(float(np.median(np.abs(errors)))),
                    format_ratio(float(np.max(np.abs(errors)))),
                )
            )
        return table((name, "cases", "median", "median size", "worst"), cells, "lrrrr")

    return [
        grouped("strategy", lambda row: f"`{row['strategy']}`"),
        grouped("batch", lambda row: row["batch_size"]),
    ]


def _constants(path: Path) -> str:
    rows = []
    profile = load_hardware(path)
    named = dict(profile.constants)
    named |= {f"strategy `{name}`, a layer": c for name, c in profile.strategy_layer_s.items()}
    for name, constant in named.items():
        if constant.kind == "assumed":
            continue
        error = constant.standard_error
        rows.append(
            (
                name if "`" in name else f"`{name}`",
                _amount(constant.value, constant.unit),
                "" if error is None else _amount(error, constant.unit),
                constant.kind,
                constant.source,
            )
        )
    return table(("constant", "value", "standard error", "kind", "source"), rows, "lrrll")


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return format_seconds(value)
    if unit == "B/s":
        return f"{format_bytes(value)}/s"
    return f"{value:.3g} {unit}".removesuffix(" 1")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], sides: str) -> str:
    """Rows as Markdown; `sides` aligns each column: l, r or c."""
    rules = [{"l": "---", "r": "---:", "c": ":---:"}[side] for side in sides]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, rules, *rows])


if __name__ == "__main__":
    sys.exit(main())
