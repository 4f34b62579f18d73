"""The runs of scripts/bench_model.py as cases and tables; used by `report_model_bench.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.qwen_moe import EXPERTS, choose_experts
from moejax.report._numbers import markdown_table
from moejax.units import format_seconds

Row = dict[str, Any]
_RATES = ("read", "copy", "product")


class Case(NamedTuple):
    """One decode step or prompt of one run.

    Attributes:
      run: Name of the run.
      kind: `decode` or `prefill`.
      size: Requests, or tokens of the prompt.
      ours: The row of our measurement.
      theirs: Samples of transformers by its implementation of the experts, fastest first.
    """

    run: str
    kind: str
    size: int
    ours: Row
    theirs: dict[str, list[float]]

    @property
    def samples(self) -> list[float]:
        """Our seconds as transformers is timed: steps of a window dispatched one after another."""
        return self.ours["pipelined" if self.kind == "decode" else "prefill"]["samples"]

    @property
    def is_chosen(self) -> bool:
        """Whether the experts ran as they do today."""
        return self.ours["experts"] == choose_experts(self.size, "gpu")

    def ratios(self) -> tuple[float, float, float]:
        """Transformers' fastest over ours: medians, then the worst and the best pair of samples."""
        theirs = next(iter(self.theirs.values()))
        return (
            float(np.median(theirs) / np.median(self.samples)),
            min(theirs) / max(self.samples),
            max(theirs) / min(self.samples),
        )


def gather(runs: Sequence[Row]) -> list[Case]:
    """Every case that was timed beside transformers, in the order of size and run."""
    cases = []
    for kind, size_name in (("decode", "batch_size"), ("prefill", "num_tokens")):
        for run in runs:
            rows = [inner for row in run["result"].get("baseline", []) for inner in row["rows"]]
            for ours in run["result"].get(kind, []):
                theirs = {
                    row["experts"]: row[kind]["samples"]
                    for row in rows
                    if kind in row and row[size_name] == ours[size_name]
                }
                if theirs and "error" not in ours:
                    ranked = dict(sorted(theirs.items(), key=lambda item: np.median(item[1])))
                    cases.append(Case(run["name"], kind, ours[size_name], ours, ranked))
    return sorted(cases, key=lambda case: (case.kind, case.size))


def sweep(run: Row) -> dict[int, dict[str, Row]]:
    """Rows of the experts by number of tokens and implementation."""
    rows: dict[int, dict[str, Row]] = {}
    for row in run["result"].get("experts", []):
        if "layer" in row:
            rows.setdefault(row["num_tokens"], {})[row["implementation"]] = row
    return dict(sorted(rows.items()))


def layer_s(run: Row, row: Row) -> float:
    """Seconds of a layer's experts: on a shared processor only the least sample says something."""
    summarise = min if backend(run) == "cpu" else np.median
    return float(summarise(row["layer"]["samples"]))


def backend(run: Row) -> str:
    return run["result"]["environment"]["backend"]


def title(run: Row) -> str:
    """What was timed where, in a few words."""
    settings, config = run["result"]["settings"], run["result"]["config"]
    model = Path(settings["model"]).name.removesuffix(".json")
    return f"{model}, {config['dtype']}, {'H100' if backend(run) == 'gpu' else 'two CPU cores'}"


def version(run: Row, library: str) -> str:
    return run["result"]["environment"]["versions"][library]


def decode_table(cases: Sequence[Case]) -> str:
    header = ("batch", "run", "our experts", "pipelined", "blocked", "bound", "over bound")
    header += ("batched_mm", "grouped_mm", "eager", "fastest / ours")
    rows = [
        (
            str(case.size),
            case.run,
            _experts_word(case),
            _range(case.samples),
            _range(case.ours["blocked"]["samples"]),
            format_seconds(case.ours["bound_s"]),
            f"{case.ours['bound_ratio']:.2f}x",
            *(_range(case.theirs.get(name)) for name in ("batched_mm", "grouped_mm", "eager")),
            _ratio_words(case),
        )
        for case in cases
        if case.kind == "decode"
    ]
    return markdown_table(header, rows, words=("run", "our experts"))


def prefill_table(cases: Sequence[Case]) -> str:
    header = ("tokens", "run", "our experts", "ours", "bound", "over bound", "grouped_mm")
    rows = [
        (
            f"{case.size:,}",
            case.run,
            _experts_word(case),
            _range(case.samples),
            format_seconds(case.ours["bound_s"]),
            f"{case.ours['bound_ratio']:.2f}x",
            _range(case.theirs.get("grouped_mm")),
            _ratio_words(case),
        )
        for case in cases
        if case.kind == "prefill"
    ]
    return markdown_table((*header, "theirs / ours"), rows, words=("run", "our experts"))


def ceilings_table(runs: Sequence[Row]) -> str:
    rows = []
    for run in runs:
        ceilings = run["result"]["ceilings"]
        rates = (
            f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s",
            f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s",
        )
        rows.append((run["name"], *rates, *(_range(ceilings[n]["samples"]) for n in _RATES)))
    return markdown_table(("run", "memory", "products", *_RATES), rows)


def sweep_table(run: Row) -> str:
    """Times of every implementation by number of tokens, and what the package chooses."""
    names = timed(run)
    header = ("tokens", *(f"`{name}`" for name in names), "bound", "fastest timed")
    lines, excess = [], {}
    for num_tokens, rows in sweep(run).items():
        times = {name: layer_s(run, row) for name, row in rows.items()}
        fastest, chosen = (
            min(times, key=times.__getitem__),
            choose_experts(num_tokens, backend(run)),
        )
        if chosen in times:
            excess[num_tokens] = times[chosen] / times[fastest]
        over = f"{excess[num_tokens]:.2f}x" if chosen in times else "not timed"
        cells = [format_seconds(times[name]) if name in times else "" for name in names]
        bound = format_seconds(next(iter(rows.values()))["bound_s"])
        lines.append((f"{num_tokens:,}", *cells, bound, f"`{fastest}`", f"`{chosen}`", over))
    header += ("`choose_experts`", "over fastest")
    table = markdown_table(header, lines, words=("fastest timed", "`choose_experts`"))
    return f"### {title(run)} ({run['name']})\n\n{_choice(excess)}\n\n{table}"


def timed(run: Row) -> list[str]:
    """Implementations that a run timed: those of the package, then those it had once."""
    found = {name for rows in sweep(run).values() for name in rows}
    return [name for name in EXPERTS if name in found] + sorted(found - set(EXPERTS))


def runs_table(runs: Sequence[Row]) -> str:
    rows = []
    for run in runs:
        environment = run["result"]["environment"]
        about = next(
            (row for part in run["result"].get("baseline", []) for row in part["rows"][:1]), {}
        )
        libraries = [f"jax {version(run, 'jax')}"]
        libraries += [
            f"{name} {about[name]}" for name in ("transformers", "torch") if name in about
        ]
        cells = (environment["device"], environment["date"][:10], ", ".join(libraries))
        command = " ".join(environment["argv"])
        commit = f"`{environment['commit']}`"
        rows.append((run["name"], *cells, commit, f"`{command}`", run["note"]))
    header = ("run", "device", "date", "versions", "commit as recorded", "command", "note")
    return markdown_table(header, rows, words=header)


def _choice(excess: dict[int, float]) -> str:
    """How good the choice is, from its time over the fastest by number of tokens."""
    if not excess:
        return "The choice was not timed."
    num_close = sum(ratio <= 1.1 for ratio in excess.values())
    worst = max(excess, key=excess.__getitem__)
    text = f"The choice is within a tenth of the fastest at {num_close} of {len(excess)} sizes"
    return text + ("." if num_close == len(excess) else f", {excess[worst]:.1f}x at {worst}.")


def _experts_word(case: Case) -> str:
    return f"`{case.ours['experts']}`" + ("" if case.is_chosen else " (no longer chosen)")


def _ratio_words(case: Case) -> str:
    middle, least, most = case.ratios()
    return f"{middle:.2f} ({least:.2f} to {most:.2f})"


def _range(samples: Sequence[float] | None) -> str:
    if not samples:
        return "not timed"
    middle, least, most = np.median(samples), min(samples), max(samples)
    return f"{format_seconds(float(middle))} ({1e3 * least:.3g} to {1e3 * most:.3g})"
