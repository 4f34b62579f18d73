"""Refits the calibrated workloads and writes their cards, the table and the figure.

    python scripts/calibrate_workload.py           refit, about two minutes on one core
    python scripts/calibrate_workload.py --check   measure the cards as they are on other requests

The refit starts from the parameters in the cards, so a second run moves them little. It writes
`models/workloads/*.toml` and `reports/workload-calibration/`.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from moejax.cards import models_dir
from moejax.report._palette import look
from moejax.results import capture_environment, write_json, write_text
from moejax.trace import statistics
from moejax.workloads import (
    WORKLOADS,
    Workload,
    assess,
    calibrate,
    default_workload,
    deviations,
    first_touch_ratio,
    lfu_hit_ratio,
    lru_hit_ratio,
    make_trace,
    oracle_hit_ratio,
)

FIT_SEED, REPORT_SEED, CHECK_SEED = 0, 77, 2024
GATED_SLOTS = (4, 8, 16, 30, 45)
GATE_RATIO = 0.03
REPORT = models_dir().parent / "reports" / "workload-calibration"
TITLES = {"lru": "LRU", "lfu": "LFU", "oracle": "Belady", "top_k": "pinned top-K"}
EXPLAINED = {
    "popularity": "standard deviation of expert biases, in units of the hidden part of a logit",
    "topic_share": "variance that barely changes within a request",
    "topic_memory": "its correlation from token to token",
    "phrase_share": "variance shared with the next few tokens",
    "phrase_memory": "its correlation from token to token",
    "token_share": "variance fixed by the token's type",
    "token_zipf": "exponent of the token types' frequencies",
    "kinship": "cosine between the router rows of counterparts in adjacent layers",
    "layer_mix": "correlation of the hidden states of adjacent layers",
}


def main() -> int:
    """Refits or checks; 1 when a gated point of the default workload is out of its tolerance."""
    parser = argparse.ArgumentParser(description="Refits the calibrated workloads.")
    parser.add_argument("--check", action="store_true", help="refit and write nothing")
    is_check = parser.parse_args().check
    targeted = [workload for workload in WORKLOADS.values() if workload.targets]
    if is_check:
        targeted = [
            dataclasses.replace(workload, achieved=assess(workload, seed=CHECK_SEED))
            for workload in targeted
        ]
    else:
        targeted = [_refit(workload) for workload in targeted]
        _write(targeted)
    for workload in targeted:
        print(f"{workload.name}\n\n{_table(workload)}\n")
    return int(any(_gate_failures(workload) for workload in targeted))


def _refit(workload: Workload) -> Workload:
    print(f"fitting {workload.name} ...", file=sys.stderr)
    fitted = calibrate(workload, seed=FIT_SEED)
    return dataclasses.replace(fitted, achieved=assess(fitted, seed=REPORT_SEED))


def _gate_failures(workload: Workload) -> list[str]:
    if workload.name != default_workload:
        return []
    return [
        " ".join(map(str, path))
        for path, miss in deviations(workload.targets, workload.achieved)
        if path[-1] in GATED_SLOTS and abs(miss) > GATE_RATIO
    ]


def _write(targeted: list[Workload]) -> None:
    for workload in targeted:
        write_text(models_dir() / "workloads" / f"{workload.name}.toml", _card(workload))
    others = {
        workload.name: _describe(workload)
        for workload in WORKLOADS.values()
        if not workload.targets
    }
    study = next(workload for workload in targeted if workload.name == "reference-study")
    memoryless = assess(_without_locality(study), seed=REPORT_SEED)["hit_ratio"]
    write_json(
        REPORT / "results.json",
        {
            "schema": "moejax.workload-calibration/1",
            "environment": capture_environment(FIT_SEED),
            "seeds": {"fit": FIT_SEED, "report": REPORT_SEED},
            "workloads": {workload.name: _record(workload) for workload in targeted},
            "reference-study without locality": memoryless,
            "not calibrated": others,
        },
    )
    _figure(targeted[0], REPORT / "figures" / "hit-curves.png")
    write_text(REPORT / "report.md", _report(targeted, memoryless, others))


def _card(workload: Workload) -> str:
    lines = ["# parameters and achieved are written by scripts/calibrate_workload.py."]
    for field in dataclasses.fields(workload):
        value = getattr(workload, field.name)
        if not isinstance(value, Mapping):
            lines.append(f"{field.name} = {_toml(value)}")
    lines += ["", "[parameters]", *_rows(workload.parameters)]
    for table in ("targets", "achieved"):
        for measure, figures in getattr(workload, table).items():
            lines += ["", f"[{table}.{measure}]", *_rows(figures)]
    return "\n".join(lines) + "\n"


def _rows(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in table.items()]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(float(f"{value:.5g}")) if isinstance(value, float) else json.dumps(value)


def _record(workload: Workload) -> dict[str, Any]:
    record = {
        name: getattr(workload, name) for name in ("parameters", "fitted", "targets", "achieved")
    }
    misses = {
        " ".join(map(str, path)): miss
        for path, miss in deviations(workload.targets, workload.achieved)
    }
    return {**record, "deviations": misses}


def _describe(workload: Workload) -> dict[str, Any]:
    """A few figures of a workload without targets, for the record."""
    trace = make_trace(workload, num_requests=16, tokens_per_request=128, seed=REPORT_SEED)
    experts = trace.experts.reshape(16, 128, *trace.experts.shape[1:])
    half = workload.num_experts // 2
    found = statistics(trace)
    return {
        "reuse_ratio": found.reuse_ratio,
        "gini": found.gini,
        "next_layer_recall_ratio": found.next_layer_recall_ratio,
        "lru_hit_ratio": lru_hit_ratio(experts, workload.num_experts)[half],
        "oracle_hit_ratio": oracle_hit_ratio(experts, workload.num_experts, (half,))[0],
    }


def _without_locality(workload: Workload) -> Workload:
    memory = {name: 0.0 for name in workload.parameters if name.endswith("_share")}
    return dataclasses.replace(workload, parameters={**workload.parameters, **memory})


def _table(workload: Workload) -> str:
    lines = ["| figure | slots | target | achieved | deviation |", "|---|---|---|---|---|"]
    for (measure, name, *slots), miss in deviations(workload.targets, workload.achieved):
        target = workload.targets[measure][name]
        value = workload.achieved[measure][name]
        if slots:
            target, value = target[slots[0]], value[slots[0]]
            gate = " (gate)" if slots[0] in GATED_SLOTS and measure == "hit_ratio_warm" else ""
            row = (f"{TITLES[name]}, {measure}", f"{slots[0]}{gate}", f"{target:.3f}")
        else:
            row = (name, "", f"{target[0]:.2f} to {target[1]:.2f}")
        lines.append(f"| {' | '.join(row)} | {value:.3f} | {miss:+.3f} |")
    return "\n".join(lines)


def _figure(workload: Workload, path: Path) -> None:
    trace = make_trace(workload, num_requests=8, tokens_per_request=512, seed=REPORT_SEED)
    experts = trace.experts.reshape(8, 512, *trace.experts.shape[1:])
    num_experts = workload.num_experts
    free = first_touch_ratio(experts, num_experts)
    slots = tuple(range(0, num_experts + 1, 2))
    curves = {
        "oracle": oracle_hit_ratio(experts, num_experts, slots),
        "lru": lru_hit_ratio(experts, num_experts)[list(slots)],
        "lfu": lfu_hit_ratio(experts, num_experts)[list(slots)],
    }
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, curve in curves.items():
        style = look(name)
        points = workload.targets["hit_ratio_warm"][name]
        warm = curve + free[list(slots)]
        axes.plot(
            slots, warm, color=style.colour, linestyle=style.line, label=f"{TITLES[name]}, workload"
        )
        axes.plot(
            points.keys(),
            points.values(),
            style.marker,
            color=style.colour,
            label=f"{TITLES[name]}, published",
        )
    axes.plot(
        [0, num_experts], [0, 1], color="#767676", linewidth=0.8, label="uniform routing, LRU"
    )
    axes.set(
        xlabel="slots per layer", ylabel="hit ratio, free slots forgiven", xlim=(0, 60), ylim=(0, 1)
    )
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)


def _report(
    targeted: list[Workload],
    memoryless: Mapping[str, Mapping[int, float]],
    others: Mapping[str, Mapping[str, float]],
) -> str:
    default = targeted[0]
    worst = max(
        (abs(miss), path)
        for path, miss in deviations(default.targets, default.achieved)
        if path[-1] in GATED_SLOTS
    )
    parameters = [
        "| parameter | meaning | " + " | ".join(workload.name for workload in targeted) + " |",
        "|---|---|" + "---|" * len(targeted),
    ]
    for name, meaning in EXPLAINED.items():
        cells = [
            f"{workload.parameters[name]:.4g}{'' if name in workload.fitted else ' (fixed)'}"
            for workload in targeted
        ]
        parameters.append(f"| {name} | {meaning} | {' | '.join(cells)} |")
    sections = [
        HEAD.format(worst=worst[0], name=TITLES[worst[1][1]], slots=worst[1][2]),
        "## Parameters\n\n" + "\n".join(parameters),
    ]
    sections += [
        f"## {workload.name}\n\n{workload.note}\n\n{_table(workload)}" for workload in targeted
    ]
    names = list(next(iter(others.values())))
    rows = [f"| workload | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, record in others.items():
        rows.append(f"| {name} | {' | '.join(f'{record[key]:.3f}' for key in names)} |")
    claims = {name: points[32] for name, points in memoryless.items()}
    sections.append(TAIL.format(**claims, others="\n".join(rows)))
    return "\n\n".join(sections) + "\n"


HEAD = """# Calibration of the synthetic workloads

Made by `python scripts/calibrate_workload.py`; figures and environment are in `results.json`.
Everything here is synthetic routing: it resembles the published averages and is no recording.

Each layer's router is a random projection of a hidden state of 16 numbers that follows the text:
a topic that drifts over a request, a phrase shared by a few tokens, the token's type (4096 types,
Zipf) and something fresh. Adjacent layers share most of their hidden state, and their experts are
near counterparts. The fit moves six numbers on 8 requests of 512 tokens; the table below is
measured on 16 other requests (and 16 more for the statistics).

The published convention: per-layer caches, one 512-token sample at a time from an empty cache,
one token's set at a time, demand only, a first touch counts as a hit while a slot is free, mean
over samples and layers. The gate is 0.03 at 4, 8, 16, 30 and 45 slots; the worst gated point is
{name} at {slots} slots with {worst:.3f}.

![Hit ratio against slots per layer: workload and published points](figures/hit-curves.png)"""

TAIL = """## What bounds the fit

- Qwen1.5-MoE: between 2 and 24 slots the published Belady curve lies above every router that was
  tried and matches the published LRU curve, so the fit ends a little below it. Three other
  structures were tried in smaller fits and not kept, for they ended hardly nearer: memories that
  change with depth, heavy-tailed instead of normal biases, and a topic whose memory is fitted
  too. The points were read off a figure.
- LRU with as many slots as a token has experts hits what the token before used. So the published
  0.19 at 4 slots and the 0.11 to 0.17 of most recorded routing (up to 0.19) meet at their edges
  only; the fit ends between them.
- Lookahead (the next gates applied to this layer's hidden state) follows from `layer_mix` and
  `kinship`; `layer_mix` was set, not fitted, for want of a published figure.
- reference-study: `multi_look` is fitted as plain LRU, which it corrects. Locality that lifts
  Belady towards the claimed value lifts LRU above its own; in this kind of router the two claims
  exclude each other and the fit splits the difference. Without locality the same popularity gives
  LRU {lru:.3f}, pinned top-K {top_k:.3f} and Belady {oracle:.3f}, so the claims need both. The
  claimed 0.785 of `intelligent` is no target: a learned strategy has to reach it by itself.

## Workloads that are not calibrated

16 requests of 128 tokens, 30 of 60 slots a layer, every load a miss.

{others}"""


if __name__ == "__main__":
    sys.exit(main())
