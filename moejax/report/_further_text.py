"""The section on what the study left open: sizes, cards, Switch, K, hybrids."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from moejax.units import format_bytes, format_ratio, format_seconds

from ._data import ReportData
from ._further import Experiment, FurtherCell
from ._hybrids_text import hybrids_text
from ._numbers import NOTHING, format_count, format_factor, markdown_table
from ._places import link, place, pointer

_FUTURE = "oracle"
_NOTHING_KEPT = "on_demand"


def further_section(data: ReportData, figures: Mapping[str, str]) -> list[str]:
    """A part for each experiment of `--full`; nothing in a run without it.

    Args:
      data: The run.
      figures: Figures as text, by the experiment that they belong to.
    """
    parts = []
    for name, (heading, write) in _PARTS.items():
        experiment = data.run.further.get(name)
        if experiment is not None:
            parts.append(f"### {heading}\n\n{write(data, experiment)}")
            parts += [figures[name]] if name in figures else []
    if not parts:
        return []
    introduction = (
        "Experiments that the study left open, each on few draws of requests, with the clock and "
        "routing of this run unless something else is said."
    )
    return ["## Beyond the study", introduction, *parts]


def _sizes(data: ReportData, sizes: Experiment) -> str:
    slots = sorted({cell.slots for cell in sizes.cells})
    tables = []
    for size in _ends(sizes):
        rows = []
        for name in sizes.strategies():
            if name == _NOTHING_KEPT:
                continue
            cells = {cell.slots: cell for cell in sizes.where(strategy=name, batch_size=size)}
            rows.append(
                (
                    _named(name, cells.values()),
                    *(
                        f"{format_seconds(cells[one].mean('latency_s'))}, "
                        f"{format_ratio(cells[one].mean('hit_ratio'))}"
                        for one in slots
                    ),
                )
            )
        taken = [
            max(cell.mean("memory_bytes") for cell in sizes.where(slots=one, batch_size=size))
            for one in slots
        ]
        every = place(cell.pointer for cell in sizes.where(batch_size=size))
        rows.append((link("*device memory*", every), *map(format_bytes, taken)))
        header = (f"batch {size}", *(f"{one} slot{'' if one == 1 else 's'}" for one in slots))
        tables.append(markdown_table(header, rows))
    return "\n\n".join(
        (
            f"Mean step and hit ratio with other slots a layer, {_draws(sizes)}; the largest "
            "device memory of a strategy in the last line. `top_k` pins at most half of a layer.",
            *tables,
        )
    )


def _cards(data: ReportData, gpus: Experiment) -> str:
    parts = [
        f"{data.run.model['name']} on every card that has a profile, {_draws(gpus)}. A strategy "
        "fits where its experts, the dense weights, the KV cache of "
        f"{gpus.settings.get('context_tokens')} tokens a request and the workspace do. All that "
        "fit is the most slots for which that holds; first demands of rare experts still miss. "
        "The titles say what each profile rests on; bold is the fastest that can be built.",
        _rooms(gpus),
    ]
    parts += [_by_card(gpus, size) for size in _ends(gpus)]
    parts.append(_rooms_of_models(gpus))
    return "\n\n".join(parts)


def _rooms(gpus: Experiment) -> str:
    rows = []
    for index, card in enumerate(gpus.facts["cards"]):
        found = {
            pointer("gpus", "rooms", number): room
            for number, room in enumerate(gpus.facts["rooms"])
            if room["hardware"] == card["name"]
        }
        rooms = found.values()
        rows.append(
            (
                link(f"`{card['name']}`", pointer("gpus", "cards", index), place(found)),
                str(card.get("title", "")),
                format_bytes(card["vram_bytes"]),
                *(
                    text
                    for room in rooms
                    for text in (format_bytes(_fixed_bytes(room)), _fitting(room))
                ),
            )
        )
    header = ["card", "profile", "memory"]
    for size in sorted({room["batch_size"] for room in gpus.facts["rooms"]}):
        header += [f"taken before experts, batch {size}", f"slots that fit, batch {size}"]
    return markdown_table(header, rows, words=("profile",))


def _by_card(gpus: Experiment, size: int) -> str:
    cards = [card["name"] for card in gpus.facts["cards"]]
    rows = []
    for cache in ("as in the run", "all that fit"):
        found = {
            (cell.strategy, cell.head["hardware"]): cell
            for cell in gpus.where(batch_size=size, cache=cache)
        }
        fastest = {card: _fastest(gpus, card, size, cache) for card in cards}
        for name in gpus.strategies():
            shown = []
            for card in cards:
                text = _fit(gpus, found.get((name, card)), card, size)
                is_best = name != _FUTURE and text == fastest[card]
                shown.append(f"**{text}**" if is_best else text)
            cells = [found[name, card] for card in cards if (name, card) in found]
            rows.append((_named(name, cells), cache, *shown))
    return markdown_table((f"batch {size}", "slots", *cards), rows, words=("slots",))


def _fit(gpus: Experiment, cell: FurtherCell | None, card: str, size: int) -> str:
    """The mean step, or what it would need where that is more than the card has."""
    if cell is None:
        return "does not fit"
    needed_bytes = _needed_bytes(gpus, cell, card, size)
    if needed_bytes > _vram_bytes(gpus, card):
        return f"needs {format_bytes(needed_bytes)}"
    return format_seconds(cell.mean("latency_s"))


def _fastest(gpus: Experiment, card: str, size: int, cache: str) -> str | None:
    """The mean step of the fastest that fits and can be built."""
    fitting = [
        cell
        for cell in gpus.where(hardware=card, batch_size=size, cache=cache)
        if cell.strategy != _FUTURE
        and _needed_bytes(gpus, cell, card, size) <= _vram_bytes(gpus, card)
    ]
    best = min(fitting, key=lambda cell: cell.mean("latency_s"), default=None)
    return None if best is None else format_seconds(best.mean("latency_s"))


def _needed_bytes(gpus: Experiment, cell: FurtherCell, card: str, size: int) -> float:
    room = next(
        room
        for room in gpus.facts["rooms"]
        if (room["hardware"], room["batch_size"]) == (card, size)
    )
    return _fixed_bytes(room) + float(cell.values["memory_bytes"].max())


def _vram_bytes(gpus: Experiment, card: str) -> float:
    return next(one["vram_bytes"] for one in gpus.facts["cards"] if one["name"] == card)


def _fixed_bytes(room: Mapping) -> float:
    return room["dense_bytes"] + room["kv_bytes"] + room["workspace_bytes"]


def _fitting(room: Mapping) -> str:
    slots, num_experts = room["slots_that_fit"], room["num_experts"]
    if slots is None:
        return "does not run"
    return f"all {slots}" if slots == num_experts else f"{slots} of {num_experts}"


def _rooms_of_models(gpus: Experiment) -> str:
    cards = [card["name"] for card in gpus.facts["cards"]]
    rooms, places = {}, {}
    for index, room in enumerate(gpus.facts["rooms_of_models"]):
        point = (room["model"], room["batch_size"])
        rooms[*point, room["hardware"]] = room
        places.setdefault(point, []).append(pointer("gpus", "rooms_of_models", index))
    rows = [
        (
            link(model, place(places[model, size])),
            str(size),
            *(_fitting(rooms[model, size, card]) for card in cards),
        )
        for model, size in places
    ]
    table = markdown_table(("model", "batch", *cards), rows)
    return (
        "Slots of a layer that fit for every model with a workload, by arithmetic: the less fits, "
        f"the more the strategy matters.\n\n{table}"
    )


def _models(data: ReportData, models: Experiment) -> str:
    claimed = data.claims["switch_transformer"]
    facts = {one["model"]: one for one in models.facts["models"]}
    rows = []
    for name in facts:
        for share in sorted({cell.head["share_ratio"] for cell in models.where(model=name)}):
            for size in models.batch_sizes():
                cells = models.where(model=name, share_ratio=share, batch_size=size)
                rows.append((_named(name, cells), format_ratio(share), str(size), *_speeds(cells)))
    strategies = [name for name in models.strategies() if name != _NOTHING_KEPT]
    header = ("model", "share with a slot", "batch", *(f"`{name}`" for name in strategies))
    described = "; ".join(
        f"{name}: {one['num_moe_layers']} layers of {one['num_experts']} experts of "
        f"{format_bytes(one['expert_bytes'])}, {one['num_experts_per_tok']} a token, "
        + (f"workload `{one['workload']}`" if one.get("workload") else "recorded routing")
        for name, one in facts.items()
    )
    text = (
        f"{described}. Speedup over `{_NOTHING_KEPT}` and hit ratio, {_draws(models)}.\n\n"
        f"{markdown_table(header, rows)}"
    )
    switch = [cell for cell in models.cells if cell.head["model"] == "switch-base-128"]
    if not switch:
        return text
    hits = max(cell.mean("hit_ratio") for cell in switch if cell.strategy != _FUTURE)
    gains = [gain for cell in switch if (gain := _speedup(cell, models.cells)) is not None]
    most = format_factor(max(gains)) if gains else NOTHING
    return (
        f"{text}\n\nThe study claims speedups of {format_factor(claimed['min_speedup'])} to "
        f"{format_factor(claimed['max_speedup'])} and more than "
        f"{format_ratio(claimed['hit_rate_percent_over'] / 100)} hits for Switch. Of what can be "
        f"built, the most hits here are {format_ratio(hits)}; the most speedup, the oracle's "
        f"included, is {most}. One expert a token leaves little to fetch at batch "
        "1, so little to gain; a batch demands more of a layer's many experts."
    )


def _named(name: str, cells: Iterable[FurtherCell]) -> str:
    """A name that leads to the cells of its row."""
    where = place(cell.pointer for cell in cells)
    return link(f"`{name}`", where) if where else f"`{name}`"


def _speeds(cells: Sequence[FurtherCell]) -> list[str]:
    shown = []
    for cell in cells:
        if cell.strategy != _NOTHING_KEPT:
            gain = _speedup(cell, cells)
            factor = NOTHING if gain is None else format_factor(gain)
            shown.append(f"{factor}, {format_ratio(cell.mean('hit_ratio'))}")
    return shown


def _speedup(cell: FurtherCell, among: Sequence[FurtherCell]) -> float | None:
    """Over what keeps nothing, in the same experiment and at the same point."""
    base = next(
        (
            one
            for one in among
            if one.strategy == _NOTHING_KEPT
            and (one.batch_size, one.slots, one.head) == (cell.batch_size, cell.slots, cell.head)
        ),
        None,
    )
    return None if base is None else base.mean("latency_s") / cell.mean("latency_s")


def _top_k(data: ReportData, top_k: Experiment) -> str:
    own = data.claims["model"]["num_experts_per_tok"]
    pins = [cell for cell in top_k.cells if cell.head["num_experts_per_tok"] == own]
    routed = top_k.where(reading="routed")
    parts = (
        'The study leaves the effect of "top-K values 4, 8, 16" open. Top-K is the name of '
        "its strategy, whose K is 32, so K is read as what it pins; since 8 is also what its "
        "model routes a token to, the other reading follows. In its geometry, "
        f"{_draws(top_k)}.",
        "K experts of every layer pinned, and the others with as many slots:",
        _by_value(top_k, pins, lambda cell: cell.slots, "K"),
        f"K experts a token, with {routed[0].slots} slots in every layer; the workload was "
        f"fitted for {own} and is not fitted again, so this is a change of the recipe, not of "
        "a model:",
        _by_value(top_k, routed, lambda cell: cell.head["num_experts_per_tok"], "top"),
        _top_k_in_words(pins, routed),
    )
    return "\n\n".join(part for part in parts if part)


def _by_value(top_k: Experiment, cells: Sequence[FurtherCell], value: Callable, letter: str) -> str:
    values = sorted({value(cell) for cell in cells})
    rows = []
    for size in top_k.batch_sizes():
        for name in top_k.strategies():
            found = {
                value(cell): cell
                for cell in cells
                if (cell.strategy, cell.batch_size) == (name, size)
            }
            rows.append(
                (
                    _named(name, found.values()),
                    str(size),
                    *(
                        f"{format_seconds(found[one].mean('latency_s'))}, "
                        f"{format_ratio(found[one].mean('hit_ratio'))}"
                        for one in values
                    ),
                )
            )
    header = ("strategy", "batch", *(f"{letter} {one}" for one in values))
    return markdown_table(header, rows)


def _top_k_in_words(pins: Sequence[FurtherCell], routed: Sequence[FurtherCell]) -> str:
    size = min(cell.batch_size for cell in pins)

    def of(cells: Sequence[FurtherCell], strategy: str) -> list[FurtherCell]:
        return [c for c in cells if (c.strategy, c.batch_size) == (strategy, size)]

    own = sorted(of(pins, "top_k"), key=lambda cell: cell.slots)
    gains = sorted(
        (
            (cell.head["num_experts_per_tok"], _speedup(cell, routed))
            for cell in of(routed, "top_k")
        ),
        key=lambda pair: pair[0],
    )
    told = [f"{format_factor(gain)} at top {value}" for value, gain in gains if gain is not None]
    if not own or not told:
        return ""
    return (
        f"With K = {own[0].slots} Top-K hits {format_ratio(own[0].mean('hit_ratio'))} at batch "
        f"{size}, with K = {own[-1].slots} {format_ratio(own[-1].mean('hit_ratio'))}, for "
        f"{format_count(own[-1].mean('memory_bytes') / own[0].mean('memory_bytes'))} times the "
        f"memory. Its speedup over `{_NOTHING_KEPT}` is {', '.join(told)}."
    )


def _ends(experiment: Experiment) -> tuple[int, ...]:
    sizes = experiment.batch_sizes()
    return tuple(dict.fromkeys((sizes[0], sizes[-1])))


def _draws(experiment: Experiment) -> str:
    number = experiment.settings.get("num_runs")
    return f"{number} draw{'' if number == 1 else 's'} of requests"


_PARTS: Mapping[str, tuple[str, Callable[[ReportData, Experiment], str]]] = {
    "capacities": ("Other cache sizes", _sizes),
    "gpus": ("Six cards", _cards),
    "models": ("Switch beside this model", _models),
    "top_k": ("K of 4, 8 and 16", _top_k),
    "hybrids": ("Hybrid strategies", hybrids_text),
}
