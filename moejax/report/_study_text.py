"""The section on the study's claims: what is surprising, the figures, and every row."""

from collections import Counter
from collections.abc import Callable, Sequence

from moejax.claims import STRATEGIES_OF_STUDY, table
from moejax.units import format_bytes, format_ratio

from ._data import ReportData
from ._numbers import NOTHING, format_count, format_factor, markdown_table
from ._places import link
from ._study import VERDICTS, AuditedClaim, Study


def study_section(data: ReportData, study: Study, figures: Sequence[str]) -> list[str]:
    """The summary, `figures` as they are given, and the whole table folded away.

    Args:
      data: The run, with the claims.
      study: Its audit.
      figures: Figures of the section, each as text.
    """
    return [
        _counts(study),
        "\n".join(f"- {sentence}" for sentence in _surprises(data, study)),
        _how_it_was_done(study),
        *figures,
        _every_row(study.rows),
    ]


def _counts(study: Study) -> str:
    found = Counter(row.verdict for row in study.rows)
    parts = [f"{found[verdict]} {_SAID[verdict]}" for verdict in VERDICTS if found[verdict]]
    return (
        f"Of the {len(study.rows)} figures and statements that the reference study claims, "
        f"{', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]}."
    )


_TIMES = "\N{MULTIPLICATION SIGN}"

_SAID = {
    "contradicts itself": "are excluded by other claims of the study",
    "depends on assumption": "come out only under an assumption that does not hold elsewhere",
    "not reproduced": "were not reproduced",
    "reproduced": "were reproduced",
}


def _surprises(data: ReportData, study: Study) -> list[str]:
    claims = data.claims
    hits = study.row("hit_rate_percent.intelligent.mean")
    gain = study.row("latency_ms.intelligent.speedup")
    growth = {name: study.row(f"latency_ms.{name}.scaling_factor") for name in STRATEGIES_OF_STUDY}
    together = {name: row.ours_otherwise or 0.0 for name, row in growth.items()}
    least, most = (choose(together, key=together.__getitem__) for choose in (min, max))
    oracle = study.row("latency_ms.oracle.speedup")
    memory_mb = table(claims, "memory", "memory_mb")
    held_bytes = study.mean("intelligent", "memory_bytes", dispatch="sequential")
    excluded = [row for row in study.rows if row.verdict == "contradicts itself"]
    throughput = claims["throughput_requests_per_s"]["oracle"]["batch16"]
    crowded_ms = table(claims, "latency_ms", "batch16_mean")["oracle"]
    num_excluded = len(excluded)
    return [
        f"**The claimed memory is not the memory of the claimed hit rates.** They take "
        f"{study.slots['stated']} experts in each of {study.facts['num_moe_layers']} layers, "
        f"{format_bytes(held_bytes)}. The {memory_mb['oracle'] / 1e3:.2f} to "
        f"{memory_mb['top_k'] / 1e3:.2f} GB that are claimed hold {study.slots['in_bytes']} a "
        f"layer, and with those `intelligent` hits {_led(_percent, hits, hits.ours_otherwise)} "
        f"instead of {_percent(hits.claimed)} and is {_led(_factor, gain, gain.ours_otherwise)} "
        f"instead of {_factor(gain.claimed)} as fast as `on_demand`.",
        f"**Latency is linear in the batch only one request after another.** A batch of 16 then "
        f"takes {_led(_factor, growth['on_demand'], growth['on_demand'].ours)} as long as one "
        "request, as claimed; decoded in lockstep, sharing experts, it takes "
        f"{_led(_factor, growth[least], together[least])} (`{least}`) to "
        f"{_led(_factor, growth[most], together[most])} (`{most}`).",
        f"**Prefetching alone cannot give the claimed speedups.** An `on_demand` step computes "
        f"for {format_ratio(_compute_ratio(study))} of its time, so hiding transfers behind "
        f"compute gives at most {format_factor(_prefetch_bound(study))}; the rest is what a cache "
        f"keeps. The oracle reaches {_led(_factor, oracle, oracle.ours)} with "
        f"{study.slots['stated']} slots in every layer and "
        f"{_led(_factor, oracle, oracle.ours_otherwise)} with the claimed memory; "
        f"{_factor(oracle.claimed)} is claimed.",
        f"**The study excludes {num_excluded} of its own figures.** Its throughput at batch 16, "
        f"{format_count(throughput)} requests a second, is ten times what its latency gives "
        f"({format_count(16 / (crowded_ms * 1e-3))}); strategies on its fronts are beaten in its "
        "own tables; its 256 slots do not fit into the memory it states.",
    ]


def _how_it_was_done(study: Study) -> str:
    settings = study.settings
    return (
        f"The study's experiment was done again: model `{settings.get('model')}`, workload "
        f"`{settings.get('workload')}`, clock `{settings.get('hardware')}`, "
        f"{study.slots['stated']} slots in every layer, requests one after another, "
        f"{settings.get('num_runs')} runs. The workload was fitted to the claimed hit rates, so "
        "it grants the study what its numbers need. A claim counts as reproduced where it lies in "
        f"our {settings.get('interval_percent')} % interval over runs, widened by "
        f"{format_ratio(settings['tolerance_ratio'])} of the claim; a verdict depends on an "
        "assumption where that no longer holds once the assumption is lifted. Claims are quoted to "
        "be audited; outside this section none of them entered a result, but for the complexity "
        "scores of one figure."
    )


def _every_row(rows: Sequence[AuditedClaim]) -> str:
    header = (
        "claim", "claimed", "ours", "interval", "assumption lifted", "this run's model",
        "verdict", "why",
    )  # fmt: skip
    ordered = sorted(rows, key=lambda row: VERDICTS.index(row.verdict))
    lines = [
        (
            link(f"`{row.claim}`", row.pointer),
            _quoted(row.claimed, row.unit),
            _written(row.ours, row.unit),
            _interval(row),
            _written(row.ours_otherwise, row.unit),
            _written(row.ours_real, row.unit),
            row.verdict,
            _why(row),
        )
        for row in ordered
    ]
    body = markdown_table(header, lines, words=("verdict", "why"))
    return f"<details>\n<summary>Every claim ({len(rows)} rows)</summary>\n\n{body}\n\n</details>"


def _why(row: AuditedClaim) -> str:
    taken = f" Assumed: {row.assumption}." if row.verdict == "depends on assumption" else ""
    ids = ", ".join(f"`{name}`" for name in row.conflicts)
    return row.reason + taken + (f" ({ids})" if ids else "")


def _interval(row: AuditedClaim) -> str:
    if row.interval is None:
        return NOTHING
    low, high = (_number(end) for end in row.interval)
    return low if low == high else f"{low} to {high}"


def _written(value: float | str | None, unit: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if unit == "x":
        return format_factor(value)
    return f"{_number(value)} {unit}".rstrip()


def _quoted(value: float | str, unit: str) -> str:
    """A claim in all the digits that it was given."""
    if isinstance(value, str):
        return value
    return f"{value:,.12g}{_TIMES}" if unit == "x" else f"{value:,.12g} {unit}".rstrip()


def _number(value: float) -> str:
    # Counts read oddly with decimals.
    return f"{value:,.0f}" if value == round(value) else format_count(value)


def _percent(value: float | str | None) -> str:
    return f"{value:.1f} %" if isinstance(value, int | float) else NOTHING


def _factor(value: float | str | None) -> str:
    return format_factor(value) if isinstance(value, int | float) else NOTHING


def _led(
    write: Callable[[float | str | None], str], row: AuditedClaim, value: float | str | None
) -> str:
    """A number of a row of the audit, led to that row."""
    return link(write(value), row.pointer)


def _compute_ratio(study: Study) -> float:
    return study.mean("on_demand", "compute_s") / study.mean("on_demand", "latency_s")


def _prefetch_bound(study: Study) -> float:
    return 1 + study.mean("on_demand", "compute_s") / study.mean("on_demand", "stall_s")
