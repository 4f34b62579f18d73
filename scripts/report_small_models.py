"""Writes reports/small-models: how tiny-moe and small-moe were trained and how they route.

    python scripts/report_small_models.py

The folder of the report holds what was measured: corpus.json (of scripts/build_corpus.py) and, in
a folder for each model, log.jsonl (of scripts/train_model.py), statistics.json and samples.json
(of scripts/record_model.py). The traces are those that come with moejax.

`--recorded FOLDER` describes recordings of other models anew, as `moejax trace import` reads them;
without it their figures in results.json are kept. `--runs FOLDER` first copies what was measured
from a folder laid out like the report's. Of the arguments of commands, copies keep the last part
of paths only: folders of the machine that ran them mean nothing elsewhere.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from small_models_figures import draw_all
from small_models_page import page
from small_models_routing import describe_own, describe_recordings

from moejax.cards import models_dir, read_card
from moejax.errors import BadFileError, MoejaxError
from moejax.results import capture_environment, read_json, to_plain, write_json, write_text

FOLDER = models_dir().parent / "reports" / "small-models"
MODELS = ("tiny-moe", "small-moe")
LOG, STATISTICS, SAMPLES, CORPUS = "log.jsonl", "statistics.json", "samples.json", "corpus.json"
# Experts, LRU, Belady at twice top-k slots a layer, in samples of 512 tokens: the curves of
# arXiv:2505.16056, digitised from the figure.
PUBLISHED_HITS = {
    "Qwen1.5-MoE-A2.7B": ("60, top-4", 0.28, 0.53),
    "Qwen3-30B-A3B": ("128, top-8", 0.65, 0.80),
    "OLMoE-1B-7B": ("64, top-8", 0.61, 0.79),
    "Mixtral-8x7B": ("8, top-2", 0.61, 0.82),
    "DeepSeekMoE-16B": ("64, top-6", 0.41, 0.64),
    "Qwen2-57B-A14B": ("64, top-8", 0.38, 0.65),
}
CURVES = ("step", "num_tokens", "loss", "balance_ratio", "dropped_ratio")


def main() -> int:
    """Writes the report; 0 when it is written."""
    parser = argparse.ArgumentParser(description="Writes the report on the small models.")
    parser.add_argument("--recorded", type=Path, help="folder of recordings of other models")
    parser.add_argument("--runs", type=Path, help="copy what was measured from here first")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the inputs lie too")
    options = parser.parse_args()
    try:
        if options.runs is not None:
            copy_runs(options.runs, options.out)
        results = gather(options.out, options.recorded)
        write_json(options.out / "results.json", results)
        results = read_json(options.out / "results.json")
        draw_all(results, options.out / "figures")
        write_text(options.out / "report.md", page(results))
    except MoejaxError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out / 'report.md'}")
    return 0


def copy_runs(runs: Path, out: Path) -> None:
    """Copies logs and results, without the folders in the arguments of commands.

    Raises:
      BadFileError: A file is missing or no JSON.
    """
    write_json(out / CORPUS, read_json(runs / CORPUS))
    for name in MODELS:
        lines = [json.dumps(drop_folders(line)) for line in read_lines(runs / name / LOG)]
        write_text(out / name / LOG, "\n".join(lines) + "\n")
        for file in (STATISTICS, SAMPLES):
            write_json(out / name / file, drop_folders(read_json(runs / name / file)))


def drop_folders(record: dict[str, Any]) -> dict[str, Any]:
    """The record with only the names of files in `environment.argv`."""
    environment = record.get("environment")
    if not isinstance(environment, dict):
        return record
    names = [word.rstrip("/").rpartition("/")[2] for word in environment["argv"]]
    return {**record, "environment": {**environment, "argv": names}}


def gather(folder: Path, recorded: Path | None) -> dict[str, Any]:
    """Everything the report says.

    Raises:
      BadFileError: Something that was measured is missing or damaged.
    """
    targets = read_card(models_dir() / "workloads" / "qwen1.5-moe.toml")
    return {
        "schema": "moejax.small-models/2",
        "environment": to_plain(capture_environment()),
        "corpus": read_json(folder / CORPUS),
        "training": {name: read_log(folder / name / LOG) for name in MODELS},
        "recording": {name: read_recording(folder / name / STATISTICS) for name in MODELS},
        "routing": {name: describe_own(name) for name in MODELS},
        "samples": {name: read_json(folder / name / SAMPLES) for name in MODELS},
        "recorded_models": (
            read_json(folder / "results.json")["recorded_models"]
            if recorded is None
            else describe_recordings(recorded)
        ),
        "published": {
            **targets["targets"]["statistics"],
            "hit_ratio_warm": targets["targets"]["hit_ratio_warm"],
            "twice_topk": PUBLISHED_HITS,
            "source": targets["source"],
        },
    }


def read_recording(path: Path) -> dict[str, Any]:
    """What was found when a model was recorded, without what is computed anew from the trace."""
    found = read_json(path)
    trace = {key: value for key, value in found["trace"].items() if key != "num_bytes"}
    return {**{key: found[key] for key in found if key != "statistics"}, "trace": trace}


def read_log(path: Path) -> dict[str, Any]:
    """The log of one training, by kind of line.

    Raises:
      BadFileError: It is missing, damaged, or of no complete training.
    """
    lines = read_lines(path)
    try:
        kinds = {
            kind: [line for line in lines if line["kind"] == kind]
            for kind in ("start", "train", "heldout", "end")
        }
        if not all(kinds.values()) or not kinds["end"][-1]["is_complete"]:
            raise BadFileError(f"{path} is the log of no complete training", "Finish the training.")
        return {
            "runs": kinds["start"],
            "curve": {name: [line[name] for line in kinds["train"]] for name in CURVES},
            "tokens_per_s": float(np.median([line["tokens_per_s"] for line in kinds["train"]])),
            "num_skipped": round(sum(line["is_skipped"] for line in kinds["train"])),
            "heldout": kinds["heldout"],
            "elapsed_s": kinds["end"][-1]["elapsed_s"],
        }
    except (KeyError, TypeError) as error:
        raise BadFileError(f"{path}: {error}", "Copy log.jsonl of the training there.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    Raises:
      BadFileError: It is missing, or a line is no JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path}: {error}", "Copy log.jsonl of the training there.") from error


if __name__ == "__main__":
    sys.exit(main())
