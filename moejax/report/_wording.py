"""Sentences that say what a run is: whose clock, whose routing, how many draws."""

from collections.abc import Mapping

from ._data import ReportData


def hardware_title(data: ReportData) -> str:
    """The profile's title, which says whose measurements it was fitted to."""
    return str(data.run.hardware.get("title") or data.run.hardware["name"])


def routing(data: ReportData) -> str:
    """What the strategies were replayed on."""
    trace = data.run.trace
    workload = trace.get("workload")
    if workload is not None:
        return f"on the calibrated synthetic workload `{workload}` (not recorded routing)"
    return f"on recorded routing (`{trace['name']}`)"


def provenance(data: ReportData) -> str:
    """What every time in the report rests on."""
    said = f"Simulated with the cost model of {hardware_title(data)}, {routing(data)}."
    if data.run.trace.get("workload") is None:
        return said
    return f"{said} Check the ranking on routing of your own (`moejax trace import`)."


def provenance_in_short(data: ReportData) -> str:
    """The same for a caption, whose reader finds the whole of it at the top of the page."""
    trace = data.run.trace
    kind = "calibrated workload" if trace.get("workload") is not None else "recorded routing"
    return f"Simulated: profile `{data.run.hardware['name']}`, {kind} `{trace['name']}`."


def constants_by_kind(data: ReportData) -> Mapping[str, tuple[str, ...]]:
    """Names of the profile's constants by where their values come from."""
    kinds: dict[str, tuple[str, ...]] = {}
    for name, constant in data.run.constants.items():
        kind = str(constant["kind"])
        kinds[kind] = (*kinds.get(kind, ()), name)
    return kinds


def num_runs(data: ReportData) -> int:
    """Draws of requests behind the best-covered cell."""
    return max(cell.num_runs for cell in data.summary.cells.values())


def listed(names: tuple[str, ...]) -> str:
    """Names in code type: `a`, `b` and `c`."""
    coded = [f"`{name}`" for name in names]
    return coded[0] if len(coded) == 1 else f"{', '.join(coded[:-1])} and {coded[-1]}"
