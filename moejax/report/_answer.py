"""The first paragraph: what to do, in plain words."""

from moejax.units import format_bytes, format_ratio, format_seconds

from ._data import ReportData
from ._numbers import format_count, format_factor, format_interval
from ._summary import Cell, Estimate, speedup
from ._wording import hardware_title, listed, routing

_KNOWS_THE_FUTURE = ("oracle",)
_PLAIN = "lru"


def answer(data: ReportData) -> str:
    """Which strategy to use, by how much it wins, and which differences are none.

    Strategies are ranked by mean step latency, never by hit ratio. Two are tied when the 95 %
    interval of the ratio of their latencies, over the same draws of requests, contains 1.
    """
    smallest, largest = data.run.batch_sizes[0], data.run.batch_sizes[-1]
    best = _best(data, smallest)
    if best is None:
        return (
            f"On {hardware_title(data)}, {routing(data)}: this run holds only strategies that "
            "know the future, so it bounds what can be reached but recommends nothing."
        )
    parts = [
        _setting(best, data.run.model.get("routed_bytes")),
        _comparison(data, best),
        _ties(data, best),
        _traffic(best),
        _bound(data, best),
    ]
    if largest != smallest:
        parts.append(_at_largest(data, best, largest))
    return " ".join(part for part in parts if part)


def _best(data: ReportData, batch_size: int) -> Cell | None:
    cells = [cell for cell in data.cells(batch_size) if cell.key.strategy not in _KNOWS_THE_FUTURE]
    return min(cells, key=lambda cell: cell.latency_s.mean, default=None)


def _setting(best: Cell, routed: int | None) -> str:
    whole = f" of the {format_bytes(routed)} that all experts take" if routed else ""
    return (
        "In this simulation, of the strategies that do not know the future, "
        f"**`{best.key.strategy}`** was the fastest: with {best.slots:g} expert slots a layer "
        f"({format_bytes(best.capacity_bytes)}{whole}) a decode step at batch "
        f"{best.key.batch_size} takes {format_seconds(best.latency_s.mean)} in the mean "
        f"(median step {format_seconds(best.p50_s.mean)}), "
        f"{format_count(best.throughput_tokens_per_s.mean)} tokens/s."
    )


def _traffic(best: Cell) -> str:
    return (
        f"{format_ratio(best.hit_ratio.mean)} of the experts that tokens needed were on the "
        f"device; {format_bytes(best.fetched_bytes.mean)} a step were copied there."
    )


def _comparison(data: ReportData, best: Cell) -> str:
    name = best.key.strategy
    sentences = []
    over_plain = _over(data, best, _PLAIN)
    if over_plain is not None and name != _PLAIN:
        saving = _saving(over_plain)
        interval = format_interval(saving, format_ratio)
        spread = f" (95 % interval {interval})" if over_plain.low == over_plain.low else ""
        sentences.append(
            f"It takes {format_ratio(saving.mean)} less time a step than `{_PLAIN}`{spread}."
        )
    if over_plain is None:
        sentences.append(f"This run has no `{_PLAIN}` to compare with.")
    if name == _PLAIN:
        sentences.append(f"Nothing in this run is faster than plain `{_PLAIN}`.")
    over_nothing = _over(data, best, "on_demand")
    if over_nothing is not None and name != "on_demand":
        times = format_factor(over_nothing.mean)
        sentences.append(f"It is {times} as fast as `on_demand`, which keeps nothing.")
    return " ".join(sentences)


def _ties(data: ReportData, best: Cell) -> str:
    others = [
        cell
        for cell in data.cells(best.key.batch_size)
        if cell.key.strategy not in (best.key.strategy, *_KNOWS_THE_FUTURE)
    ]
    if not others:
        return ""
    if best.num_runs < 2:
        return "There was one draw of requests, so no interval tells wins from noise."
    ratios = {cell.key.strategy: _over(data, best, cell.key.strategy) for cell in others}
    tied = tuple(name for name, one in ratios.items() if one is not None and one.low <= 1.0)
    if not tied:
        return "No other one ties with it."
    return f"{listed(tied)} {'is' if len(tied) == 1 else 'are'} within the interval of it: a tie."


def _bound(data: ReportData, best: Cell) -> str:
    oracle = data.summary.cell("oracle", *best.key[1:])
    if oracle is None:
        return ""
    return (
        "`oracle`, which knows the future and so cannot be built, would need "
        f"{format_seconds(oracle.latency_s.mean)}."
    )


def _at_largest(data: ReportData, best: Cell, largest: int) -> str:
    found = _best(data, largest)
    if found is None:
        return ""
    same = "still " if found.key.strategy == best.key.strategy else ""
    return (
        f"At batch {largest} it is {same}**`{found.key.strategy}`**: mean step "
        f"{format_seconds(found.latency_s.mean)}, "
        f"{format_count(found.throughput_tokens_per_s.mean)} tokens/s. {_ties(data, found)}"
    ).rstrip()


def _over(data: ReportData, best: Cell, baseline: str) -> Estimate | None:
    return speedup(data.summary, best.key.strategy, baseline, *best.key[1:])


def _saving(over: Estimate) -> Estimate:
    """Share of time saved from a speedup."""
    return Estimate(1 - 1 / over.mean, over.std, 1 - 1 / over.low, 1 - 1 / over.high)
