"""The report as text: answer first, then figures, tables, audit, method, limits and glossary."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moejax.units import format_bytes

from ._answer import answer
from ._captions import caption, title
from ._claims import AuditRow, audit, audit_dispatch
from ._data import NotDrawnError, ReportData
from ._further_text import further_section
from ._glossary import glossary, strategies_table
from ._numbers import (
    NOTHING,
    escape,
    format_constant,
    format_field,
    format_with_interval,
    markdown_table,
)
from ._places import RESULTS_FILE, link, pointer
from ._selection_text import selection_section
from ._statistics_text import statistics_section
from ._study_text import study_section
from ._tables import (
    compute_table,
    hit_curve_table,
    latency_table,
    pareto_table,
    scaling_table,
    speedup_table,
    tiers_table,
    traffic_table,
    transfer_table,
)
from ._wording import constants_by_kind, hardware_title, listed, num_runs, provenance
from ._worth_text import worth_section
from .figures import CLAIMS_FIGURES, FURTHER_FIGURES
from .statistics import CONFIDENCE_RATIO, NUM_RESAMPLES

STUDY_MODEL = "reference-study"

_OF_A_SECTION = (*CLAIMS_FIGURES, *FURTHER_FIGURES.values())


def report_markdown(data: ReportData, drawn: Sequence[str], not_drawn: Mapping[str, str]) -> str:
    """The whole report.

    Args:
      data: The run.
      drawn: Names of the figures that lie in `figures/`, in the order of the report.
      not_drawn: Reason by name of the figures that this run has no data for.
    """
    model = data.run.model["name"]
    sections = [
        f"# Which experts to keep: {model} on {data.run.hardware['name']}",
        "## What to do with this card",
        answer(data),
        f"> {provenance(data)}",
        _how_to_read(data),
        *selection_section(data),
        "## Figures",
        *(_figure(name, data) for name in drawn if name not in _OF_A_SECTION),
        _missing(not_drawn),
        "## Tables",
        *_tables(data),
        *statistics_section(data),
        *worth_section(data),
        *further_section(data, _of_experiments(data, drawn)),
        "## The study's claims",
        *_audit(data, [_figure(name, data) for name in drawn if name in CLAIMS_FIGURES]),
        _measured(data),
        _method(data),
        _limits(data),
        _environment(data),
        glossary(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _how_to_read(data: ReportData) -> str:
    shown = data.dispatch
    lines = [
        "## How to read this",
        "- A *step* decodes one token for every request of the batch. Times and bytes are per "
        "step unless something else is said.",
        "- A *slot* is room for one expert on the device. Their number is a setting of this run "
        "(`moejax bench --slots` or `--budget`).",
        "- A *hit* is a demanded expert that was resident; a *late* one was on its way and the "
        "step waited for the rest; a *miss* was copied on demand. *Wasted* bytes were prefetched "
        "and not used. *Stall* is time that no compute hides.",
        f"- Intervals are {100 * CONFIDENCE_RATIO:g} % bootstrap intervals over "
        f"{num_runs(data)} draws of requests. A difference within its interval is called a tie.",
        "- Strategies are ranked by latency; a higher hit ratio that does not save time is no win.",
        f"- A linked number leads to the records in `{RESULTS_FILE}` that it was made from, and a "
        "linked name to those of its row: `#/grid/0-9` are the items 0 to 9 of the list `grid`, "
        "and `;` joins several places.",
    ]
    if len(data.run.dispatches) > 1:
        lines.append(
            f"- Figures without a panel per dispatch show *{shown}* dispatch: the requests of a "
            "batch decode in lockstep and share experts. *Sequential* replays them one after "
            "another, as the reference study assumes."
        )
    else:
        meaning = {
            "batched": "the requests of a batch decode in lockstep and share experts",
            "sequential": "the requests of a batch are replayed one after another",
        }[shown]
        lines.append(f"- Dispatch is *{shown}* throughout: {meaning}.")
    text = lines[0] + "\n\n" + "\n".join(lines[1:])
    return f"{text}\n\n{strategies_table(data.run.strategies)}".rstrip()


def _figure(name: str, data: ReportData) -> str:
    words = caption(name, data)
    shows = escape(title(name))
    return f"### {title(name)}\n\n[![{shows}](figures/{name}.png)](figures/{name}.svg)\n\n*{words}*"


def _of_experiments(data: ReportData, drawn: Sequence[str]) -> dict[str, str]:
    return {
        experiment: _figure(name, data)
        for experiment, name in FURTHER_FIGURES.items()
        if name in drawn
    }


def _missing(not_drawn: Mapping[str, str]) -> str:
    # The section on the claims says itself what an audit would add, that on choosing what --full.
    not_drawn = {name: why for name, why in not_drawn.items() if name not in _OF_A_SECTION}
    if not not_drawn:
        return ""
    lines = [f"- {title(name)}: {reason}." for name, reason in not_drawn.items()]
    return "Not drawn:\n\n" + "\n".join(lines)


def _tables(data: ReportData) -> list[str]:
    tables: list[tuple[str, Callable[[], str]]] = []
    for dispatch in data.run.dispatches:
        named = f", {dispatch} dispatch" if len(data.run.dispatches) > 1 else ""
        tables += [
            (f"Step latency{named}", partial(latency_table, data, dispatch)),
            *(
                (f"Speedup over `{base}`{named}", partial(speedup_table, data, base, dispatch))
                for base in ("on_demand", "lru")
            ),
            (f"Scaling{named}", partial(scaling_table, data, dispatch)),
            (f"Hits, traffic, time and memory{named}", partial(traffic_table, data, dispatch)),
        ]
    tables += [
        ("Trade-offs at the smallest batch", partial(pareto_table, data)),
        ("Hit ratio (warm) against slots per layer", partial(hit_curve_table, data)),
        ("Tiers", partial(tiers_table, data)),
    ]
    return [text for heading, make in tables if (text := _section(heading, make))]


def _section(heading: str, make: Callable[[], str]) -> str:
    try:
        return f"### {heading}\n\n{make()}"
    except NotDrawnError:
        return ""


def _audit(data: ReportData, figures: Sequence[str]) -> list[str]:
    conflicts = [
        f"- `{entry['id']}`: {entry['conflict']}" for entry in data.claims["known_conflicts"]
    ]
    study = data.run.study
    beside = _beside(data) if study is None else study_section(data, study, figures)
    return [*beside, "Conflicts found in the claims:\n\n" + "\n".join(conflicts)]


def _beside(data: ReportData) -> list[str]:
    rows = [_audit_row(row) for row in audit(data)]
    header = ("quantity", "strategy", "claimed", "ours", "why they differ")
    return [
        f"{_geometry(data)} Ours is {audit_dispatch(data)} dispatch at equal slots for every "
        "strategy. Claims are quoted to be audited; none of them entered a computation, except "
        "the complexity scores of one figure.",
        markdown_table(header, rows, words=("strategy", "why they differ")),
    ]


def _audit_row(row: AuditRow) -> tuple[str, ...]:
    ids = ", ".join(f"`{name}`" for name in row.quantity.conflicts)
    return (
        row.quantity.title,
        f"`{row.strategy}`",
        row.quantity.write(row.claimed),
        _ours(row),
        row.quantity.reason + (f" ({ids})" if ids else ""),
    )


def _ours(row: AuditRow) -> str:
    if row.ours is None:
        return NOTHING
    return link(format_with_interval(row.ours.estimate, row.quantity.write), *row.ours.places)


def _geometry(data: ReportData) -> str:
    model, claimed = data.run.model, data.claims["model"]
    if model["name"] == STUDY_MODEL:
        return "This run has the study's own geometry."
    return (
        f"**The geometry differs.** The study assumes {claimed['num_experts']} experts in "
        f"{claimed['num_layers']} layers, top-{claimed['num_experts_per_tok']}, "
        f"{claimed['expert_mb']} MB each; this run is {model['name']} with "
        f"{_field(model, 'num_experts')} experts in {_field(model, 'num_moe_layers')} layers, "
        f"top-{_field(model, 'num_experts_per_tok')}, {format_bytes(model['expert_bytes'])} each. "
        "That alone changes every number below; `moejax bench --audit` compares like with like and "
        "judges every claim."
    )


def _field(holder: Mapping[str, Any], name: str) -> str:
    value = holder.get(name)
    return "an unknown number of" if value is None else str(value)


def _measured(data: ReportData) -> str:
    device = data.run.environment.get("device", "the machine of the run")
    tables = [
        text
        for heading, make in (
            ("Copies", partial(transfer_table, data)),
            ("Expert compute", partial(compute_table, data)),
        )
        if (text := _section(heading, make))
    ]
    if not tables:
        return "## Measured on this machine\n\nNothing was timed in this run."
    intro = (
        f"Timed on {device}, the machine that ran the bench. The simulated figures rest on the "
        f"profile {data.run.hardware['name']}, not on these times."
    )
    return "\n\n".join(["## Measured on this machine", intro, *tables])


def _method(data: ReportData) -> str:
    trace, model = data.run.trace, data.run.model
    steps = sorted({record.num_steps for record in data.run.records})
    counted = " to ".join(f"{number:,}" for number in dict.fromkeys((steps[0], steps[-1])))
    origin = ", ".join(
        f"{name} {trace[name]}" for name in ("source", "licence", "sha256") if trace.get(name)
    )
    lines = [
        "## Method",
        f"- Model: {model['name']}, {format_bytes(model['expert_bytes'])} an expert"
        + (f" ({model['source']})" if model.get("source") else "")
        + ".",
        f"- Routing: {trace['name']}" + (f"; {origin}" if origin else "") + ".",
        f"- Grid: {len(data.run.records)} points: {listed(data.run.strategies)}; batch "
        f"{', '.join(str(size) for size in data.run.batch_sizes)}; up to {num_runs(data)} runs; "
        f"{counted} counted steps each. A run is another draw of requests and of the strategy's "
        "seed; no noise is added, and all strategies see the same requests.",
        "- Each step is replayed on a timeline: attention, demanded experts as a set, one link "
        "that copies in order, compute that hides part of the wait, retention by the strategy's "
        "scores, prefetches behind demand.",
        f"- Intervals: percentile bootstrap of the mean over runs, {NUM_RESAMPLES:,} resamples, "
        "fixed seed; ratios resample pairs of the same draw.",
        "- Percentiles (p50, p95, p99) are over the steps of a run, then averaged over runs.",
        f"- Clock: {hardware_title(data)}.",
    ]
    text = lines[0] + "\n\n" + "\n".join(lines[1:])
    return text + _constants(data)


def _constants(data: ReportData) -> str:
    if not data.run.constants:
        return ""
    rows = []
    for name, constant in data.run.constants.items():
        error, unit = constant.get("standard_error"), str(constant["unit"])
        rows.append(
            (
                link(f"`{name}`", pointer("hardware", "constants", name)),
                format_constant(constant["value"], unit),
                NOTHING if error is None else format_constant(error, unit),
                str(constant["kind"]),
                str(constant.get("source", "")),
            )
        )
    header = ("constant", "value", "standard error", "kind", "source")
    table = markdown_table(header, rows, words=("kind", "source"))
    return f"\n\n### Constants of the clock\n\n{table}"


def _limits(data: ReportData) -> str:
    kinds = constants_by_kind(data)
    lines = [
        "## Limits",
        "- Every latency is simulated; none was measured on this hardware. Intervals cover the "
        "draw of requests, not the error of the cost model.",
    ]
    unmeasured = (("datasheet", "taken from a datasheet"), ("assumed", "assumed"))
    lines += [
        f"- Constants of the clock that are {said}, not measured: {listed(kinds[kind])}."
        for kind, said in unmeasured
        if kind in kinds
    ]
    if data.run.hardware.get("note"):
        lines.append(f"- The profile's own note: {data.run.hardware['note']}")
    if data.run.trace.get("workload") is not None:
        lines.append(
            "- The routing is synthetic: drawn from a router calibrated to published statistics. "
            "It is no evidence for the ranking of strategies; recorded routing is."
        )
    lines.append(
        "- Device memory is that of routed experts; dense weights, KV cache and workspace come "
        "on top."
    )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _environment(data: ReportData) -> str:
    environment = data.run.environment
    rows = [
        (link(name, pointer(section, name)), format_field(value))
        for section, holder in (("environment", environment), ("settings", data.run.settings))
        for name, value in holder.items()
        if name != "argv"
    ]
    parts = [
        "## Environment and settings",
        markdown_table(("what", "value"), rows, words=("value",)),
    ]
    argv = environment.get("argv")
    if isinstance(argv, list) and argv:
        command = shlex.join(str(word) for word in argv)
        parts += ["The command that made `results.json`:", f"```sh\n{command}\n```"]
    return "\n\n".join(parts)
