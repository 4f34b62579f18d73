"""Hybrids beside their parts: the study's open question."""

import numpy as np
from jaxtyping import Float

from moejax.units import format_bytes, format_change, format_ratio, format_seconds

from ._data import ReportData
from ._further import Experiment, FurtherCell
from ._numbers import NOTHING, format_constant, markdown_table
from ._statistics_text import LEVEL_RATIO
from ._summary import CellKey
from .statistics import Paired, bootstrap_interval, compare_paired, holm

_FUTURE = "oracle"
_ON_HOST = "host_compute"


def hybrids_text(data: ReportData, hybrids: Experiment) -> str:
    """Every hybrid against the best of its parts on the same draws, and what it rests on."""
    judged = judged_cells(hybrids)
    paired = [_against(data, cell, best_part(data, hybrids, cell)) for cell in judged]
    chances = holm([one.p_t for one in paired if one is not None])
    corrected = iter(chances)
    rows = [
        _row(data, hybrids, cell, one, None if one is None else next(corrected))
        for cell, one in zip(judged, paired, strict=True)
    ]
    header = (
        "hybrid", "batch", "mean step", "on a cautious host", "best of its parts",
        "change", "95 % interval", "verdict", "hit ratio", "fetched", "speed, of the oracle's",
    )  # fmt: skip
    share = format_ratio(hybrids.settings.get("pinned_share_ratio", 0.0))
    return "\n\n".join(
        (
            f"`pinned` keeps the profile's hottest {share} of a layer's experts for good; "
            "`with_prefetch` adds prefetches by layer-to-layer transitions; `host_compute` "
            "computes a miss on the host where that ends sooner than the copy. Same slots and "
            "draws as the strategies that they are made of; the change is of the mean step.",
            markdown_table(header, rows, words=("best of its parts", "verdict")),
            f"Verdicts by a paired t test, corrected by Holm's method over the {len(chances)} rows "
            f"at {format_ratio(LEVEL_RATIO)}. {_what_host_rests_on(data)}",
        )
    )


def judged_cells(hybrids: Experiment) -> list[FurtherCell]:
    """What is judged: with `host_compute` the cautious host, without it the run's own."""
    return [
        cell
        for cell in hybrids.cells
        if cell.head["host"] == ("cautious" if _on_host(cell) else "stated")
    ]


def best_part(data: ReportData, hybrids: Experiment, cell: FurtherCell) -> str | None:
    """The fastest of a hybrid's parts that the run has; None where it has none."""
    found = {
        name: latencies_s(data, name, cell.batch_size).mean()
        for name in hybrids.facts["parts"].get(cell.strategy, ())
        if CellKey(name, cell.batch_size, data.dispatch) in data.summary.records
    }
    return min(found, key=found.__getitem__, default=None)


def latencies_s(data: ReportData, strategy: str, batch_size: int) -> Float[np.ndarray, " draws"]:
    """Mean step latency of a strategy of the grid on every draw."""
    rows = data.summary.records[CellKey(strategy, batch_size, data.dispatch)]
    return np.array([row.latency_s.mean for row in rows])


def _row(
    data: ReportData,
    hybrids: Experiment,
    cell: FurtherCell,
    paired: Paired | None,
    chance: float | None,
) -> tuple[str, ...]:
    best = best_part(data, hybrids, cell)
    own = {one.head["host"]: one for one in hybrids.cells if _same(one, cell)}
    cautious = format_seconds(own["cautious"].mean("latency_s")) if _on_host(cell) else NOTHING
    oracle = data.summary.cell(_FUTURE, cell.batch_size, data.dispatch)
    change = interval = verdict = part = NOTHING
    if best is not None:
        theirs = latencies_s(data, best, cell.batch_size)
        part = f"`{best}`, {format_seconds(float(theirs.mean()))}"
        change = format_change(cell.mean("latency_s") / float(theirs.mean()) - 1)
        if paired is not None and chance is not None:
            mine = cell.values["latency_s"][: len(theirs)]
            low, high = bootstrap_interval(
                lambda a, b: a.mean(-1) / b.mean(-1) - 1, mine, theirs[: len(mine)]
            )
            interval = f"{format_change(low)} to {format_change(high)}"
            is_tie = chance >= LEVEL_RATIO
            verdict = "tie" if is_tie else "faster" if paired.mean < 0 else "slower"
    return (
        f"`{cell.strategy}`",
        str(cell.batch_size),
        format_seconds(own["stated"].mean("latency_s")),
        cautious,
        part,
        change,
        interval,
        verdict,
        format_ratio(cell.mean("hit_ratio")),
        format_bytes(cell.mean("fetched_bytes")),
        NOTHING if oracle is None else format_ratio(oracle.latency_s.mean / cell.mean("latency_s")),
    )


def _what_host_rests_on(data: ReportData) -> str:
    constants = data.run.constants
    said = (
        "Hybrids with `host_compute` are judged on a cautious host, which slows every copy as a "
        "reading host does and reads experts no faster than one thread of it copies. The third "
        "column takes the profile at its word"
    )
    if "host_read_bytes_per_s" not in constants:
        return f"{said}."
    stated = constants["host_read_bytes_per_s"]
    rate = format_constant(stated["value"], str(stated["unit"]))
    source = str(stated.get("source", "")).rstrip(".")
    return f"{said}: a host that reads experts at {rate} ({stated['kind']}: {source})."


def _against(data: ReportData, cell: FurtherCell, part: str | None) -> Paired | None:
    if part is None:
        return None
    mine, theirs = cell.values["latency_s"], latencies_s(data, part, cell.batch_size)
    shared = min(len(mine), len(theirs))
    return compare_paired(mine[:shared], theirs[:shared])


def _same(one: FurtherCell, other: FurtherCell) -> bool:
    return (one.strategy, one.batch_size) == (other.strategy, other.batch_size)


def _on_host(cell: FurtherCell) -> bool:
    return cell.strategy.startswith(_ON_HOST)
