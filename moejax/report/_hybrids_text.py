"""Hybrids beside their parts: the study's open question."""

import math
from collections.abc import Sequence

from moejax.units import format_bytes, format_change, format_ratio, format_seconds

from ._data import ReportData
from ._further import Experiment
from ._hybrids import DEPENDS, DISPATCH, Change, Judged, computes_on_host, judge_hybrids
from ._numbers import NOTHING, format_constant, markdown_table
from ._places import link
from .statistics import LEVEL_RATIO

_FUTURE = "oracle"


def hybrids_text(data: ReportData, hybrids: Experiment) -> str:
    """Every hybrid against the best of its parts on the same draws, and what it rests on."""
    judged = judge_hybrids(data, hybrids)
    header = (
        "hybrid", "batch", "best of its parts", "mean step", "change", "on a cautious host",
        "change there", "verdict", "hit ratio", "fetched", "speed, of the oracle's",
    )  # fmt: skip
    share = format_ratio(hybrids.settings.get("pinned_share_ratio", 0.0))
    return "\n\n".join(
        (
            f"`pinned` keeps the profile's hottest {share} of a layer's experts for good; "
            "`with_prefetch` adds prefetches by layer-to-layer transitions; `host_compute` "
            "computes a miss on the host where that ends sooner than the copy. Same slots and "
            "draws as the strategies that they are made of; the change is of the mean step, with "
            "its 95 % interval.",
            markdown_table(
                header,
                [_row(data, one) for one in judged],
                words=("best of its parts", "verdict"),
            ),
            f"{_in_words(judged)} {_what_host_rests_on(data)}",
        )
    )


def _row(data: ReportData, one: Judged) -> tuple[str, ...]:
    cell, cautious = one.cell, one.changes.get("cautious")
    names = (_FUTURE, one.part or "")
    oracle, part = (data.summary.cell(name, cell.batch_size, DISPATCH) for name in names)
    others = [found.place for found in (part, oracle) if found is not None]
    return (
        link(f"`{cell.strategy}`", cell.pointer, *others),
        str(cell.batch_size),
        NOTHING if one.part is None else f"`{one.part}`, {format_seconds(one.part_s)}",
        format_seconds(cell.mean("latency_s")),
        _change(one.changes.get("stated")),
        NOTHING if cautious is None else link(format_seconds(cautious.latency_s), cautious.place),
        _change(cautious),
        one.verdict or NOTHING,
        format_ratio(cell.mean("hit_ratio")),
        format_bytes(cell.mean("fetched_bytes")),
        NOTHING if oracle is None else format_ratio(oracle.latency_s.mean / cell.mean("latency_s")),
    )


def _change(change: Change | None) -> str:
    if change is None:
        return NOTHING
    if math.isnan(change.low):
        return format_change(change.ratio)
    ends = f"{format_change(change.low)} to {format_change(change.high)}"
    return f"{format_change(change.ratio)} ({ends})"


def _in_words(judged: Sequence[Judged]) -> str:
    """How often hybrids beat their parts, by kind."""
    if not any(one.verdict for one in judged):
        return "One draw of requests gives no verdicts."
    sentences = []
    for kind, is_on_host in (("Without `host_compute`", False), ("With it", True)):
        some = [one for one in judged if one.changes and _on_host(one) == is_on_host]
        if not some:
            continue
        faster = [one for one in some if one.verdict == "faster"]
        said = f"{kind} they beat the best of their parts in {len(faster)} of {len(some)} cases"
        if faster:
            best = min(faster, key=_surest)
            said += (
                f", `{best.cell.strategy}` at batch {best.cell.batch_size} the most, by "
                f"{format_ratio(-_surest(best))}" + (" or more" if is_on_host else "")
            )
        depending = sum(one.verdict == DEPENDS for one in some)
        if depending:
            said += f"; in {depending} it depends on the host"
        sentences.append(f"{said}.")
    num_tests = sum(len(one.changes) for one in judged)
    sentences.append(
        f"Verdicts by paired t tests, corrected by Holm's method over {num_tests} at "
        f"{format_ratio(LEVEL_RATIO)}."
    )
    return " ".join(sentences)


def _on_host(one: Judged) -> bool:
    return computes_on_host(one.cell.strategy)


def _surest(one: Judged) -> float:
    """The change on the host that is worse for it."""
    return max(change.ratio for change in one.changes.values())


def _what_host_rests_on(data: ReportData) -> str:
    constants = data.run.constants
    said = (
        "A cautious host slows every copy as a reading host does, whether it reads or not, and "
        "reads experts no faster than one thread of it copies. The mean step takes the profile at "
        "its word"
    )
    if "host_read_bytes_per_s" not in constants:
        return f"{said}."
    stated = constants["host_read_bytes_per_s"]
    rate = format_constant(stated["value"], str(stated["unit"]))
    source = str(stated.get("source", "")).rstrip(".")
    return f"{said}: a host that reads experts at {rate} ({stated['kind']}: {source})."
