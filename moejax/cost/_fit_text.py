"""The evidence for a fitted copy law, as Markdown for people."""

import statistics

from moejax.units import format_bytes, format_change, format_ratio, format_seconds

from ._fit_copy import CopyFit
from ._fit_csv import CsvFit

_LAWS = (
    ("fitted law", "predicted_s"),
    ("baseline: datasheet bandwidth, no latency", "roofline_s"),
    ("baseline: latency and bandwidth through two points", "two_point_s"),
)


def format_fit(fit: CsvFit, *, title: str = "") -> str:
    """Parameters with errors, every size beside two baselines, and the outside checks.

    Args:
      fit: The fit to show.
      title: Heading; empty names the card.
    """
    copy = fit.copy
    source = fit.hardware.constants["copy_latency_s"].source
    lines = [
        f"# {title or f'Copy law of {fit.gpu}'}",
        "",
        f"{source[:1].upper()}{source[1:]}: pinned host to device, time domain {fit.time_domain}.",
        "",
        f"- latency {format_seconds(copy.latency_s)}, standard error"
        f" {format_seconds(copy.latency_standard_error_s)}",
        f"- bandwidth {copy.bytes_per_s / 1e9:.2f} GB/s, standard error"
        f" {copy.bytes_per_s_standard_error / 1e9:.2f} GB/s",
        "",
        *_size_table(copy),
        *_held_out_table(copy),
        *_check_table(fit),
    ]
    return "\n".join(lines) + "\n"


def _size_table(copy: CopyFit) -> list[str]:
    return [
        "| size | observed | predicted | error | held out | datasheet | two points |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {format_bytes(row.num_bytes)} | {format_seconds(row.observed_s)}"
            f" | {format_seconds(row.predicted_s)} | {format_change(row.error_ratio)}"
            f" | {'yes' if row.is_held_out else ''}"
            f" | {format_change(row.roofline_s / row.observed_s - 1)}"
            f" | {format_change(row.two_point_s / row.observed_s - 1)} |"
            for row in copy.rows
        ),
    ]


def _held_out_table(copy: CopyFit) -> list[str]:
    held_out = [row for row in copy.rows if row.is_held_out]
    if not held_out:
        return ["", "Too few sizes to hold any out."]
    lines = ["", "| held-out sizes | median error | largest error |", "|---|---|---|"]
    for label, field in _LAWS:
        errors = [abs(getattr(row, field) / row.observed_s - 1) for row in held_out]
        median, largest = statistics.median(errors), max(errors)
        lines.append(f"| {label} | {format_ratio(median)} | {format_ratio(largest)} |")
    inside = f"{copy.num_inside} of {len(held_out)}"
    return [*lines, "", f"The 90 % intervals of the fitted law hold {inside} held-out sizes."]


def _check_table(fit: CsvFit) -> list[str]:
    if not fit.checks:
        return []
    lines = [
        "",
        "Outside checks: other rigs, time domains and loads, predicted by the law, not pooled.",
        "",
        "| rig | memory | size | time domain | quoted GB/s | predicted GB/s | error | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for check in fit.checks:
        row = check.row
        size = format_bytes(row.num_bytes) if row.num_bytes is not None else "not given"
        note = row.note.replace("|", "/")
        lines.append(
            f"| {row.rig} | {row.memory} | {size} | {row.time_domain}"
            f" | {row.bytes_per_s / 1e9:.3g} | {check.predicted_bytes_per_s / 1e9:.3g}"
            f" | {check.error_ratio:+.0%} | {note} |"
        )
    return lines
