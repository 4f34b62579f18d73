"""The page of reports/outside-truth, from its results."""

from collections.abc import Iterable, Sequence
from typing import Any

from moejax.units import format_change, format_ratio, format_seconds

BEST = "hand-off once and quantised kernels"
"""The explanation with the smallest errors."""

Row = dict[str, Any]


def page(results: Row) -> str:
    """The report."""
    sections = [
        _head(results),
        "## Published decode steps, by source\n\n" + _sources(results),
        "## Why the errors are what they are\n\n" + _explanations(results),
        "## Every published decode step\n\n" + _steps(results),
        "## Rates that no profile was made from\n\n" + _rates(results),
        "## Our own runs on an H100 and an H200\n\n" + _own(results),
        LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def summary(results: Row) -> Row:
    """The figures that the README repeats."""
    sources = _predicted(results)
    steps = [
        run
        for profile in results["profiles"].values()
        for run in profile["own_runs"]
        if run["quantity"] == "step"
    ]
    return {
        "num_sources": len(sources),
        "num_met": sum(source["is_met"] for source in sources),
        "num_steps": sum(source["num_predicted"] for source in sources),
        "medians": [source["median_error_ratio"] for source in sources],
        "medians_with_terms": [
            source["median_error_ratio"]
            for source in _explanation(results, BEST)["sources"]
            if source["median_error_ratio"] is not None
        ],
        "own_medians": [run["median_error_ratio"] for run in steps],
    }


def _head(results: Row) -> str:
    environment = results["environment"]
    found = summary(results)
    best = ", ".join(format_ratio(ratio) for ratio in found["medians_with_terms"])
    return HEAD.format(
        date=environment["date"][:10],
        commit=environment["commit"],
        target=format_ratio(results["target_ratio"]),
        num_met=found["num_met"],
        num_sources=found["num_sources"],
        num_tried=len(results["explanations"]),
        best=best,
    )


def _sources(results: Row) -> str:
    decode = _profile(results)["decode_sources"]
    rigs = {rig["title"]: rig for rig in results["rigs"]}
    head = ("source", "rig", "predicted", "median error", "worst", "bias", "target")
    rows = [
        (
            source["source"],
            rigs[source["source"]]["rig"],
            f"{source['num_predicted']} of {source['num_rows']}",
            _ratio(source["median_error_ratio"]),
            _ratio(source["worst_error_ratio"]),
            _change(source["bias_ratio"]),
            {None: "", True: "met", False: "**missed**"}[source["is_met"]],
        )
        for source in decode
    ]
    return SOURCES.format(errors=_table(head, rows), laws=_table(LAW_HEAD, _laws(decode)))


def _laws(sources: Iterable[Row]) -> list[tuple[str, ...]]:
    return [
        (
            source["source"],
            format_seconds(source["published_intercept_s"]),
            format_seconds(source["predicted_intercept_s"]),
            format_seconds(source["published_slope_s"]),
            format_seconds(source["predicted_slope_s"]),
            "two points"
            if source["linear_ratio"] is None
            else format_ratio(source["linear_ratio"]),
            " + ".join(map(format_seconds, source["stated_law"] or ())),
        )
        for source in sources
        if source["published_slope_s"] is not None
    ]


def _explanations(results: Row) -> str:
    shipped = _predicted(results)
    titles = [source["source"] for source in shipped]
    head = ("explanation", *titles)
    rows = [("as shipped", *_medians(shipped))]
    laws = [("as shipped", *_law_errors(shipped))]
    for explanation in results["explanations"]:
        sources = [source for source in explanation["sources"] if source["source"] in titles]
        rows.append((explanation["name"], *_medians(sources)))
        laws.append((explanation["name"], *_law_errors(sources)))
    texts = [
        f"- **{explanation['name']}**: {explanation['what']} ({explanation['source']})."
        for explanation in results["explanations"]
    ]
    lines = [source["source"] for source in shipped if source["published_slope_s"] is not None]
    law_head = ("explanation", *(f"{title}: intercept, slope" for title in lines))
    return EXPLAINED.format(
        texts="\n".join(texts), medians=_table(head, rows), laws=_table(law_head, laws)
    )


def _medians(sources: Iterable[Row]) -> list[str]:
    return [
        f"{format_ratio(source['median_error_ratio'])} ({format_change(source['bias_ratio'])})"
        for source in sources
    ]


def _law_errors(sources: Iterable[Row]) -> list[str]:
    return [
        ", ".join(
            format_change(source[f"predicted_{name}_s"] / source[f"published_{name}_s"] - 1)
            for name in ("intercept", "slope")
        )
        for source in sources
        if source["published_slope_s"] is not None
    ]


def _steps(results: Row) -> str:
    head = (
        *("source", "test", "hits", "published", "predicted", "error"),
        *("layers", "experts", "misses", "assumed, or why not predicted"),
    )
    rows = [
        (
            row["source"],
            row["test"],
            _ratio(row["hit_ratio"]),
            format_seconds(row["published_s"]),
            _seconds(row["predicted_s"]),
            _change(row["error_ratio"]),
            *(_seconds(row[f"{part}_s"]) for part in ("layers", "experts", "misses")),
            row["remark"],
        )
        for row in _profile(results)["decode"]
    ]
    return STEPS.format(table=_table(head, rows))


def _rates(results: Row) -> str:
    head = ("profile", "quantity", "rows", "median error", "worst")
    summaries = [
        (
            *(quantity["profile"], quantity["quantity"], str(quantity["num_rows"])),
            *(format_ratio(quantity[f"{key}_error_ratio"]) for key in ("median", "worst")),
        )
        for profile in results["profiles"].values()
        for quantity in profile["rate_quantities"]
    ]
    every = ("profile", "quantity", "card", "size", "published", "predicted", "error", "note")
    rows = [
        (
            *(row["profile"], row["quantity"], row["gpu"], row["size"]),
            *(_rate(row, key) for key in ("published_per_s", "predicted_per_s")),
            format_change(row["error_ratio"]),
            f"{row['note']} ({row['source']})",
        )
        for profile in results["profiles"].values()
        for row in profile["rates"]
        if row["profile"] != "rtx-3090"
    ]
    return RATES.format(summaries=_table(head, summaries), rows=_table(every, rows))


def _own(results: Row) -> str:
    head = ("profile", "run", "what", "batch", "cases", "median error", "worst", "bias")
    rows = [
        (
            *(name, run["run"], run["quantity"]),
            "" if run["batch_size"] is None else str(run["batch_size"]),
            str(run["num_rows"]),
            *(format_ratio(run[f"{key}_error_ratio"]) for key in ("median", "worst")),
            format_change(run["bias_ratio"]),
        )
        for name, profile in results["profiles"].items()
        for run in profile["own_runs"]
    ]
    return OWN.format(table=_table(head, rows))


def _profile(results: Row) -> Row:
    return results["profiles"]["rtx-3090"]


def _predicted(results: Row) -> list[Row]:
    sources = _profile(results)["decode_sources"]
    return [source for source in sources if source["median_error_ratio"] is not None]


def _explanation(results: Row, name: str) -> Row:
    return next(one for one in results["explanations"] if one["name"] == name)


def _rate(row: Row, key: str) -> str:
    if row["quantity"] == "compute":
        return f"{row[key] / 1e12:.4g} TFLOP/s"
    return f"{row[key] / 1e9:.4g} GB/s"


def _ratio(value: float | None) -> str:
    return "" if value is None else format_ratio(value)


def _change(value: float | None) -> str:
    return "" if value is None else format_change(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else format_seconds(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


LAW_HEAD = (
    *("source", "intercept, published", "ours", "slope, published", "ours"),
    *("variance explained by their line", "stated by the source"),
)

HEAD = """# Predictions beside measurements that no fit saw

Made by `python scripts/report_outside.py` on {date}, commit {commit}; `moejax validate --hardware
NAME` prints the same for one profile. Figures and environment are in `results.json`. Every
prediction is made by the cost model that all commands use, from a shipped profile, a model card
and what the source states. We own no RTX 3090, and no constant was fitted or changed for these
rows.

Of {num_sources} sources of RTX 3090 decode steps that state enough, the median error of {num_met}
is within the target of {target}. That is better than the model deserves: its steps without misses
are too short and its misses too long, and in the middle the two errors cancel. Of the
{num_tried} explanations tried, all of them below, the one of smallest errors adds two terms that
others measured on such a rig: a hand-off to the CPU once a layer, and the rate of quantised
kernels. It was chosen after these rows were seen, and leaves median errors of {best}.

![Predicted against published step time, a panel for each source](figures/decode.png)

*The band is the target, 15 % around equality. Filled: as shipped; hollow: with the two terms of
the best explanation. ([SVG](figures/decode.svg))*"""

SOURCES = """\
Error is predicted over published step time, minus 1; bias is its median with the sign. Sources are
not pooled. Their engine keeps experts in the cards' memory and lets the CPU compute the missed
ones at the same time, so a miss is priced as an expert on the host, which reads memory at the rate
the source states. With layers split over cards one of them works at a time, so that a token takes
what it takes on one.

{errors}

The law of step time against miss ratio, by least squares over the cached steps of a source and
over our predictions of the same steps. Published steps do lie on a line, and so do ours; but not
on the same one.

{laws}"""

EXPLAINED = """\
Each explanation changes one constant to what another project (0xSero/moetier) measured on an RTX
3090 of its own, or charges it where that project did. None is a decode speed, none was adjusted.

{texts}

Median error, and bias, of each source:

{medians}

Error of intercept and slope:

{laws}

What is missing, then:

- **Slope.** `host_expert_fixed_s`, the hand-off to the CPU, was measured once a layer and is
  charged to every missed expert: 145 us of the 359 us of a miss of GLM-5.3-Flash at 44 GB/s, of
  the 200 us of one of Qwen3.8-Flash-Next. Charged once, slopes are within 12 % of the published
  ones.
- **Intercept.** `kernel_efficiency_ratio` is that of a bf16 kernel on an H100. These files hold
  experts in 2.8 and 3.9 bits and the rest in 5.5 to 9.3, and such kernels are bound by decoding;
  the rate measured is of a 3-bit one and is taken for all. Longer layers explain the intercept of
  GLM-5.3-Flash about as well, and in their place bring every source within the target too; for
  Qwen3.8-Flash-Next nobody published them. Which share each has, these rows do not tell.
- With both terms GLM-5.3-Flash on machine A stays 11 to 13 % too fast, in slope and intercept.
  Uploads of experts that share the CPU's memory would do that; no measurement says so.

Both terms are named here and not put into the profile: a profile changed after a look at these
rows would no longer be checked by them."""

STEPS = """\
The parts of a prediction: attention, shared experts, head and fixed costs; routed experts on the
device; and waiting for the host, less what the device hides.

{table}"""

RATES = """\
Copies to the device, device memory and products in bf16, or fp16 of the same rigs, by the
profiles' constants. Rows of the RTX 3090 are in [its fit](../../models/hardware/rtx-3090-fit.md)
and in `results.json`; most of its large errors are rigs of another kind (a chipset slot of four
lanes, PCIe 3.0, a virtual machine), or copies that a host waits for one by one.

{summaries}

- **Compute** is within 7 % in the median. Small products are the exception (1,024 wide on an RTX
  4090): the smooth roofline has no time for launching.
- **Copies**: a profile has one link, and a published rig another. Cloud machines, OpenCL, copies
  by kernels instead of the copy engine, and host buffers of 10 GB and more are slower by a sixth
  to a half.
- **Memory**: what a copy reaches depends on its kernel, here by 16 to 24 %; the profiles hold
  faster ones.
- The H200 has one such row, the A100 80 GB and it none of copies: what is published made the
  profiles.

{rows}"""

OWN = """\
The shipped `h100` and `h200` know nothing of these runs: `h100` was made from earlier measurements
of ours, `h200` from published ones and, for the rest, from `h100`. Steps are those of
Qwen1.5-MoE-A2.7B with experts in host memory; rates are those measured in the same run.

{table}

- Steps are within 7 % in the median at every batch size, because most of them wait for the link.
- Steps of 4 and 16 requests without misses come out 15 to 29 % too short with `h100`: it states no
  `batched_layer_s`, what a layer costs more for several requests. At batch 1 they are within 3 %.
- Steps of strategies that prefetch, and of some that only score, come out up to 28 % too short:
  shipped profiles know neither `prefetch_overlap_ratio` nor what a strategy's program costs. A
  profile fitted to the engine states all three, and [is checked
  separately](../h100-ladder/report.md).
- `h200` states 3.17 TB/s for device memory, a published copy kernel; the engine's run reads 4.11
  TB/s. Its steps without misses at batch 1 come out 14 % too long.
- Both profiles state 10 % less than the products of these runs reach; no step here is bound by
  them."""

LIMITS = """## Limits

- Sources are few and of one author and engine; three of them are one machine. Their hit ratios are
  their own counts, some of them stated as "about".
- The explanations, and the profile's `layer_fixed_s` and host constants, are from 0xSero/moetier:
  another engine, quantisation and machine, but the same GLM-5.3-Flash on an RTX 3090.
- Sizes of the files come from memory breakdowns that the engine prints; that of the file with Q4_K
  attention is its total less experts and embedding.
- The table of gains (12 steps) states neither hit ratios nor what stock placement leaves on the
  cards: its "share in VRAM" is memory over file size. It is listed and not predicted."""
