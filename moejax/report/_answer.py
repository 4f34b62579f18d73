"""The first section: what to do, in plain words."""

from moejax.units import format_bytes, format_ratio, format_seconds

from ._data import ReportData
from ._money import best_on_card
from ._numbers import format_count, format_factor, format_interval
from ._places import link, pointer
from ._room import MEMORY_PLACE, Room, room
from ._summary import Cell, Estimate, speedup
from ._wording import hardware_title, listed, routing

_KNOWS_THE_FUTURE = ("oracle",)
_PLAIN = "lru"


def answer(data: ReportData) -> str:
    """Which strategy to use, what it buys, how many slots to give it, and what to do next.

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
    points = {
        "What it buys": _gain(data, best),
        f"With {largest} requests at once": _at_largest(data, best, largest),
        "How many slots": _slots(data, best),
        "What is left to gain": _bound(data, best),
        "What to do next": _next(data),
    }
    if largest == smallest:
        del points[f"With {largest} requests at once"]
    lines = [f"- **{name}.** {said}" for name, said in points.items() if said]
    return "\n\n".join([_setting(data, best), "\n".join(lines)])


def _best(data: ReportData, batch_size: int) -> Cell | None:
    cells = [cell for cell in data.cells(batch_size) if cell.key.strategy not in _KNOWS_THE_FUTURE]
    return min(cells, key=lambda cell: cell.latency_s.mean, default=None)


def _setting(data: ReportData, best: Cell) -> str:
    routed = data.run.model.get("routed_bytes")
    whole = ""
    if routed:
        whole = f" of the {link(format_bytes(routed), pointer('model'))} that all experts take"
    size = best.key.batch_size
    return (
        f"**Use `{best.key.strategy}`.** Of the strategies that do not know the future it was the "
        f"fastest in this simulation: with {best.slots:g} expert slots a layer "
        f"({link(format_bytes(best.capacity_bytes), best.place)}{whole}) a decode step "
        f"{'of one request' if size == 1 else f'at batch {size}'} takes {_latency(best)} in the "
        f"mean (median step {link(format_seconds(best.p50_s.mean), best.place)}), "
        f"{_throughput(best)}."
    )


def _latency(cell: Cell) -> str:
    return link(format_seconds(cell.latency_s.mean), cell.place)


def _throughput(cell: Cell) -> str:
    return link(f"{format_count(cell.throughput_tokens_per_s.mean)} tokens/s", cell.place)


def _gain(data: ReportData, best: Cell) -> str:
    parts = (_comparison(data, best), _ties(data, best), _hits(best))
    return " ".join(part for part in parts if part)


def _hits(best: Cell) -> str:
    return (
        f"{link(format_ratio(best.hit_ratio.mean), best.place)} of the experts that tokens needed "
        f"were on the card; {link(format_bytes(best.fetched_bytes.mean), best.place)} a step were "
        "copied to it."
    )


def _comparison(data: ReportData, best: Cell) -> str:
    name = best.key.strategy
    sentences = []
    over_plain = _over(data, best, _PLAIN)
    if over_plain is not None and name != _PLAIN:
        saving = _saving(over_plain)
        interval = format_interval(saving, format_ratio)
        spread = f" (95 % interval {interval})" if over_plain.low == over_plain.low else ""
        less = _linked_ratio(data, best, _PLAIN, format_ratio(saving.mean))
        sentences.append(f"{less} less time a step than with `{_PLAIN}`{spread}.")
    if over_plain is None:
        sentences.append(f"This run has no `{_PLAIN}` to compare with.")
    if name == _PLAIN:
        sentences.append(f"Nothing in this run is faster than plain `{_PLAIN}`.")
    over_nothing = _over(data, best, "on_demand")
    if over_nothing is not None and name != "on_demand":
        times = _linked_ratio(data, best, "on_demand", format_factor(over_nothing.mean))
        sentences.append(f"It is {times} as fast as `on_demand`, which keeps nothing.")
    return " ".join(sentences)


def _linked_ratio(data: ReportData, best: Cell, baseline: str, text: str) -> str:
    other = data.summary.cell(baseline, *best.key[1:])
    return link(text, *(cell.place for cell in (other, best) if cell is not None))


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
        return "No other strategy ties with it."
    return f"{listed(tied)} {'is' if len(tied) == 1 else 'are'} within the interval of it: a tie."


def _at_largest(data: ReportData, best: Cell, largest: int) -> str:
    found = _best(data, largest)
    if found is None:
        return ""
    name = found.key.strategy
    use = f"`{name}` as well" if name == best.key.strategy else f"Use **`{name}`**"
    return (
        f"{use}: a step takes {_latency(found)} in the mean, {_throughput(found)} in all. "
        f"{_ties(data, found)}"
    ).rstrip()


def _slots(data: ReportData, best: Cell) -> str:
    """What the card has room for beside what the run gave it, and what that would hit."""
    given = f"This run was given {best.slots:g} a layer; that is a setting, not what fits."
    found = room(data)
    if found is None:
        return f"{given} {_fastest_with_all(data, best)}".rstrip()
    card = (
        f"Of the card's {link(_memory(found.memory_bytes), MEMORY_PLACE)} the dense weights "
        f"take {link(format_bytes(found.dense_bytes), pointer('model'))} and the KV cache of "
        f"{found.context_tokens:,} tokens {link(format_bytes(found.kv_bytes), pointer('model'))}."
    )
    if found.slots >= found.num_experts:
        return (
            f"{given} {card} Every expert fits beside them: keep all on the card, and no strategy "
            "is needed."
        )
    if found.slots < 1:
        return f"{given} {card} No layer can have a slot of its own beside them."
    fits = f"The rest is room for {found.slots} slots a layer, less what other programs hold."
    gain = _fastest_with_all(data, best) or _hits_with_all(data, found, best)
    return " ".join(part for part in (given, card, fits, gain) if part)


def _memory(num_bytes: float) -> str:
    """Cards are sold by GiB under the name of GB."""
    return f"{format_bytes(num_bytes)} ({format_count(num_bytes / 2**30)} GiB)"


def _fastest_with_all(data: ReportData, best: Cell) -> str:
    """What `--full` found with all slots that fit on the run's own card."""
    if "gpus" not in data.run.further:
        return ""
    card, size = data.run.hardware["name"], best.key.batch_size
    fastest = best_on_card(data, card, size)
    if fastest is None:
        return ""
    said = link(format_seconds(fastest.mean("latency_s")), fastest.pointer)
    named = f"`{fastest.strategy}`" + (" as well" if fastest.strategy == best.key.strategy else "")
    plain = data.run.further["gpus"].where(
        hardware=card, batch_size=size, cache="all that fit", strategy=_PLAIN
    )
    beside = ""
    if plain and fastest.strategy != _PLAIN:
        time_s = link(format_seconds(plain[0].mean("latency_s")), plain[0].pointer)
        beside = f" beside {time_s} with `{_PLAIN}`"
    return f"**With the {fastest.slots} that fit the fastest is {named}: {said} a step**{beside}."


def _hits_with_all(data: ReportData, found: Room, best: Cell) -> str:
    curve = data.run.hit_curve.get(_PLAIN)
    if curve is None or found.slots <= best.slots:
        return ""
    hits = dict(zip(curve.slots, curve.hit_ratio_warm, strict=True))
    most = max((slots for slots in hits if slots <= found.slots), default=0)
    if best.slots not in hits or most <= best.slots:
        return ""
    at = pointer("hit_curve", _PLAIN)
    return (
        f"Plain `{_PLAIN}` hits {link(format_ratio(hits[best.slots]), at)} with {best.slots:g} "
        f"slots and {link(format_ratio(hits[most]), at)} with {most:g} (first uses aside)."
    )


def _bound(data: ReportData, best: Cell) -> str:
    oracle = data.summary.cell("oracle", *best.key[1:])
    if oracle is None:
        return ""
    return (
        "With the same slots `oracle`, which knows the future and so cannot be built, would need "
        f"{_latency(oracle)} a step."
    )


def _next(data: ReportData) -> str:
    model, hardware = data.run.model["name"], data.run.hardware["name"]
    size = (
        f"`moejax tune-cache --model {model} --hardware {hardware} --budget SIZE --include-dense` "
        "says how to spend the memory you have, layer by layer."
    )
    if data.run.trace.get("workload") is None:
        return size
    return (
        f"{size} This routing is synthetic: `moejax trace import` takes your own, and "
        "`moejax bench --trace FILE` does all of this again on it."
    )


def _over(data: ReportData, best: Cell, baseline: str) -> Estimate | None:
    return speedup(data.summary, best.key.strategy, baseline, *best.key[1:])


def _saving(over: Estimate) -> Estimate:
    """Share of time saved from a speedup."""
    return Estimate(1 - 1 / over.mean, over.std, 1 - 1 / over.low, 1 - 1 / over.high)
