"""Writes reports/small-models: how tiny-moe and small-moe were trained and how they route.

    python scripts/report_small_models.py --recorded FOLDER

The folder of the report holds what the training and the recording left: tiny-moe.jsonl and
small-moe.jsonl (log.jsonl of scripts/train_model.py), statistics.json and samples.json (of
scripts/record_small_moe.py). FOLDER holds recordings of other models, as `moejax trace import`
reads them; without it the figures of results.json are kept.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from moejax.cards import models_dir, read_card
from moejax.errors import BadFileError, MoejaxError
from moejax.report._palette import FAINT, GRID, INK
from moejax.results import capture_environment, read_json, to_plain, write_json, write_text
from moejax.trace import import_trace, statistics
from moejax.units import format_ratio, format_seconds

FOLDER = models_dir().parent / "reports" / "small-models"
MODELS = ("tiny-moe", "small-moe")
MEASURES = {
    "reuse_ratio": "reuse by the next token",
    "reuse_chance_ratio": "reuse by chance",
    "gini": "Gini of popularity",
    "max_mean_load_ratio": "busiest over mean expert",
    "next_layer_recall_ratio": "next-layer recall",
}
TRAIN_COLOUR, HELDOUT_COLOUR = FAINT, "#5A1FE0"


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the report on the small models.")
    parser.add_argument("--recorded", type=Path, help="folder of recordings of other models")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the inputs lie too")
    options = parser.parse_args()
    try:
        results = gather(options.out, options.recorded)
        write_json(options.out / "results.json", results)
        draw_losses(results["training"], options.out / "figures")
        write_text(options.out / "report.md", page(results))
    except MoejaxError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


def gather(folder: Path, recorded: Path | None) -> dict[str, Any]:
    """Everything the report says."""
    qwen = read_card(models_dir() / "workloads" / "qwen1.5-moe.toml")
    return {
        "schema": "moejax.small-models/1",
        "environment": to_plain(capture_environment(0)),
        "training": {name: read_log(folder / f"{name}.jsonl") for name in MODELS},
        "recording": read_json(folder / "statistics.json"),
        "samples": read_json(folder / "samples.json"),
        "recorded_models": (
            read_json(folder / "results.json")["recorded_models"]
            if recorded is None
            else describe_recordings(recorded)
        ),
        "published": {**qwen["targets"]["statistics"], "source": qwen["source"]},
    }


def read_log(path: Path) -> dict[str, Any]:
    """The log of one training, by kind of line."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kinds = {
            kind: [line for line in lines if line["kind"] == kind]
            for kind in ("start", "train", "heldout", "end")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{path}: {error}", "Copy log.jsonl of the training there.") from error
    if not all(kinds.values()):
        raise BadFileError(f"{path} is the log of no complete training", "Finish the training.")
    return {
        "runs": kinds["start"],
        "curve": {
            name: [line[name] for line in kinds["train"]]
            for name in ("step", "num_tokens", "loss", "balance_ratio", "dropped_ratio")
        },
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in kinds["train"]])),
        "num_skipped": round(sum(line["is_skipped"] for line in kinds["train"])),
        "heldout": kinds["heldout"],
        "elapsed_s": kinds["end"][-1]["elapsed_s"],
        "is_complete": kinds["end"][-1]["is_complete"],
    }


def describe_recordings(folder: Path) -> dict[str, dict[str, Any]]:
    """Statistics of every recording in a folder, by the code that describes ours."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            trace = import_trace(path)
        except MoejaxError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        described = to_plain(statistics(trace))
        found[path.stem] = {
            **{name: described[name] for name in MEASURES},
            "num_tokens": trace.num_tokens,
            "shape": f"{trace.num_layers} x {trace.num_experts}, top-{trace.topk}",
        }
    return found


def draw_losses(training: dict[str, Any], folder: Path) -> None:
    """Training and held-out loss of both models over their steps."""
    figure, panels = plt.subplots(1, len(MODELS), figsize=(9, 3.6), layout="constrained")
    for axes, (name, log) in zip(panels, training.items(), strict=True):
        curve = log["curve"]
        axes.plot(curve["step"], curve["loss"], color=TRAIN_COLOUR, linewidth=0.8, label="training")
        axes.plot(
            [line["step"] for line in log["heldout"]],
            [line["loss"]["all"] for line in log["heldout"]],
            "o-",
            color=HELDOUT_COLOUR,
            label="held out, all domains",
        )
        unit = "byte" if name == "tiny-moe" else "token"
        axes.set_title(name, color=INK)
        axes.set(xlabel="step", ylabel=f"loss, nats a {unit}", yscale="log")
        axes.yaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.grid(color=GRID)
        axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(folder / f"loss.{suffix}", dpi=160, metadata=metadata)
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    recording = results["recording"]
    domains, recall = recording["domains"], recording["lookahead_recall"]
    topk = next(iter(recall["1"]))
    lines = [
        "# tiny-moe and small-moe: training and routing",
        "",
        "Two models of Qwen1.5-MoE's kind, trained from scratch by `scripts/train_model.py` on the "
        "corpus of `scripts/build_corpus.py`. Their routing is learned, but it is that of small "
        "models trained for minutes, not Qwen's. All figures are in `results.json`.",
        "",
        "![Loss over the steps of both models](figures/loss.png)",
        "",
        "## Training",
        "",
        *_training_table(results["training"]),
        "",
        "## Held-out loss",
        "",
        "Documents that were not trained on, at most 512 tokens of context, nothing dropped; "
        "small-moe as its bfloat16 checkpoint computes it.",
        "",
        *_heldout_table(results),
        "",
        "## Routing of small-moe beside recorded models",
        "",
        f"{recording['trace']['num_tokens']:,} generated tokens of "
        f"{sum(recording['trace']['num_requests'].values())} texts over "
        f"{len(recording['trace']['num_requests'])} domains, sampled at temperature "
        f"{recording['trace']['temperature']:g}. The other rows are other people's recordings, "
        "described by the same code; the recordings are not part of the project. The last row "
        f"quotes {results['published']['source']}.",
        "",
        *_routing_table(results),
        "",
        "## Domains",
        "",
        "Total variation between expert frequencies, mean of layers, between halves of the texts: "
        f"{domains['within_domain_distance']:.3f} within one domain, "
        f"{domains['between_domains_distance']:.3f} between two.",
        "",
        *_profile_table(domains),
        "",
        "## What the next gates say ahead",
        "",
        "Share of a layer's experts that its own norm and gate name from the stream that enters "
        "an earlier layer's experts.",
        "",
        f"| layers ahead | {' | '.join(name.replace('_', ' ') for name in recall['1'])} |",
        "|---" * (1 + len(recall["1"])) + "|",
        *(
            f"| {ahead} | {' | '.join(f'{value:.3f}' for value in row.values())} |"
            for ahead, row in recall.items()
        ),
        "",
        f"`{topk.replace('_', ' ')}` counts the gate's first choices only.",
        "",
        "## Samples of small-moe",
        "",
    ]
    for domain, sample in results["samples"].items():
        lines += [f"### {domain}", "", "````text", sample["prompt"] + " [...] " + sample["text"]]
        lines += ["````", ""]
    return "\n".join(lines)


def _training_table(training: dict[str, Any]) -> list[str]:
    rows = {
        "device": lambda log: log["runs"][0]["environment"]["device"],
        "weights": lambda log: f"{log['runs'][0]['num_weights'] / 1e6:.1f} M",
        "attention": lambda log: log["runs"][0]["attention"],
        "steps": lambda log: f"{log['curve']['step'][-1]:,}",
        "tokens read": lambda log: f"{log['curve']['num_tokens'][-1] / 1e6:,.0f} M",
        "tokens a second, median": lambda log: f"{log['tokens_per_s']:,.0f}",
        "wall-clock time, all included": lambda log: format_seconds(log["elapsed_s"]),
        "training loss at the end, nats": lambda log: f"{log['curve']['loss'][-1]:.3f}",
        "load-balancing loss at the end, over its least": lambda log: (
            f"{log['curve']['balance_ratio'][-1]:.3f}"
        ),
        "dropped pairs at the end": lambda log: format_ratio(log["curve"]["dropped_ratio"][-1]),
        "steps skipped for a gradient that was not finite": lambda log: str(log["num_skipped"]),
    }
    return [
        "| | " + " | ".join(training) + " |",
        "|---" * (1 + len(training)) + "|",
        *(
            f"| {name} | {' | '.join(say(log) for log in training.values())} |"
            for name, say in rows.items()
        ),
    ]


def _heldout_table(results: dict[str, Any]) -> list[str]:
    tiny = results["training"]["tiny-moe"]["heldout"][-1]
    small = results["recording"]["heldout"]
    return [
        "| domain | tiny-moe, bits a byte | small-moe, bits a byte | small-moe, nats a token |",
        "|---|---|---|---|",
        *(
            f"| {name} | {tiny['bits_per_byte'][name]:.3f} | {small['bits_per_byte'][name]:.3f} "
            f"| {small['loss'][name]:.3f} |"
            for name in small["loss"]
        ),
    ]


def _routing_table(results: dict[str, Any]) -> list[str]:
    rows = {
        "**small-moe**": results["recording"]["statistics"],
        **results["recorded_models"],
        "Qwen1.5-MoE-A2.7B, as published": results["published"],
    }
    lines = [
        f"| recording | shape | {' | '.join(MEASURES.values())} |",
        "|---" * (2 + len(MEASURES)) + "|",
    ]
    for name, row in rows.items():
        cells = [_cell(row.get(measure)) for measure in MEASURES]
        shape = row.get("shape", "24 x 60, top-4")
        lines.append(f"| {name} | {shape} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | list[float] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(f"{bound:.2f}" for bound in value)
    return f"{value:.3f}"


def _profile_table(domains: dict[str, Any]) -> list[str]:
    lines = [
        "| experts pinned | profile of the same domain | of another domain | chance |",
        "|---|---|---|---|",
    ]
    for name, row in domains.items():
        if name.startswith("pinned_"):
            cells = (
                row[key]
                for key in ("same_domain_hit_ratio", "other_domain_hit_ratio", "chance_ratio")
            )
            share = format_ratio(float(name.removeprefix("pinned_")))
            lines.append(f"| {share} | {' | '.join(format_ratio(cell) for cell in cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
