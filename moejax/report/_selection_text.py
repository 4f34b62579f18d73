"""The section on choosing: a matrix over batch sizes, or the answer to a user's constraints."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moejax.errors import InfeasibleBudgetError
from moejax.units import format_bytes, format_ratio, format_seconds

from ._constraints import KINDS, Candidate, Constraint
from ._data import ReportData
from ._numbers import NOTHING, format_count, markdown_table
from ._places import link
from ._selection import KEEPS_NOTHING, Choice, candidates, choose


class _Wish(NamedTuple):
    """A line of the default matrix: what is wanted, and the study's rules for the like of it."""

    title: str
    constraints: tuple[Constraint, ...] = ()
    cost: Callable[[Candidate], float] = lambda one: one.mean_s
    rules: tuple[str, ...] = ()
    time_s: Callable[[Candidate], float] = lambda one: one.mean_s


_NO_SCORE = (
    "Complexity is the reference study's score, its opinion; what it did not score meets no limit "
    "on it."
)
_MB, _GB = 1e6, 1e9
_WISHES = (
    _Wish("lowest mean latency", rules=("maximum performance",)),
    _Wish(
        "lowest 99th percentile",
        cost=lambda one: one.p99_s,
        rules=("production deployment",),
        time_s=lambda one: one.p99_s,
    ),
    _Wish(
        "memory at most 500 MB",
        (Constraint("memory", 500 * _MB),),
        rules=("memory budget < 500 MB",),
    ),
    _Wish("memory at most 2 GB", (Constraint("memory", 2 * _GB),)),
    _Wish(
        "complexity at most 4",
        (Constraint("complexity", 4.0),),
        rules=("quick implementation", "development time < 3 months"),
    ),
    _Wish(
        "memory at most 2 GB, complexity at most 4",
        (Constraint("memory", 2 * _GB), Constraint("complexity", 4.0)),
    ),
    _Wish(
        "most speed for its memory, of what keeps anything",
        (),
        lambda one: one.mean_s * one.memory_bytes if one.hit_ratio else math.inf,
        ("memory efficiency priority",),
    ),
)


def selection_rows(data: ReportData) -> list[dict[str, Any]]:
    """The answer to the user's constraints for programs: a record a batch size.

    Raises:
      InfeasibleBudgetError: Nothing meets them at any batch size.
    """
    choices = _choices(data)
    if all(choice.best is None for choice in choices.values()):
        size = data.run.batch_sizes[0]
        raise InfeasibleBudgetError(
            f"nothing in this run meets {_limits(data)} at any batch size",
            f"Relax a limit. At batch {size}: {_nearest(choices[size])}.",
        )
    return [_record(size, choice) for size, choice in choices.items()]


def selection_section(data: ReportData) -> list[str]:
    """The user's constraints, or the matrix where there are none."""
    if data.constraints:
        return ["## Choosing under your constraints", *_under(data)]
    return ["## Choosing", *_matrix(data)]


def _choices(data: ReportData) -> Mapping[int, Choice]:
    sizes = data.run.batch_sizes
    return {size: choose(candidates(data, size), data.constraints) for size in sizes}


def _record(batch_size: int, choice: Choice) -> dict[str, Any]:
    best = choice.best
    return {
        "batch_size": batch_size,
        "strategy": None if best is None else best.strategy,
        "slots": None if best is None else best.slots,
        "latency_s": None if best is None else best.mean_s,
        "p99_s": None if best is None else best.p99_s,
        "tokens_per_s": None if best is None else best.tokens_per_s,
        "hit_ratio": None if best is None else best.hit_ratio,
        "memory_bytes": None if best is None else best.memory_bytes,
        "ties": [_named(one) for one in choice.ties],
        "num_left": choice.num_left,
        "num_candidates": choice.num_all,
        "excluded_by": {str(limit): number for limit, number in choice.excluded.items()},
    }


def _under(data: ReportData) -> list[str]:
    choices = _choices(data)
    header = (
        "batch", "choose", "slots a layer", "mean step", "p99", "tokens/s", "hit ratio",
        "device memory", "as good", "left of all",
    )  # fmt: skip
    rows = [_row(size, choice) for size, choice in choices.items()]
    parts = [
        f"Wanted: {_limits(data)}. Of what meets that the fastest is named; *as good* are others "
        f"whose interval over the same draws holds equal latency. {_chosen_among(data)}",
        markdown_table(header, rows, words=("choose", "as good")),
        "\n".join(
            f"- Batch {size}: {_nearest(choice)}."
            for size, choice in choices.items()
            if choice.best is None
        ),
        _exclusions(choices) if any(choice.excluded for choice in choices.values()) else "",
        _NO_SCORE if any(one.name == "complexity" for one in data.constraints) else "",
    ]
    return [part for part in parts if part]


def _limits(data: ReportData) -> str:
    return " and ".join(str(one) for one in data.constraints)


def _row(batch_size: int, choice: Choice) -> tuple[str, ...]:
    best, left = choice.best, f"{choice.num_left} of {choice.num_all}"
    if best is None:
        return (str(batch_size), "nothing", *(NOTHING,) * 7, left)
    return (
        link(str(batch_size), best.place),
        f"`{best.strategy}`",
        format(best.slots, "g"),
        format_seconds(best.mean_s),
        format_seconds(best.p99_s),
        format_count(best.tokens_per_s),
        format_ratio(best.hit_ratio),
        format_bytes(best.memory_bytes),
        ", ".join(_named(one) for one in choice.ties) or NOTHING,
        left,
    )


def _exclusions(choices: Mapping[int, Choice]) -> str:
    """What every constraint leaves out by itself."""
    limits = dict.fromkeys(limit for choice in choices.values() for limit in choice.excluded)
    rows = [
        (
            str(limit),
            *(f"{choice.excluded[limit]} of {choice.num_all}" for choice in choices.values()),
        )
        for limit in limits
    ]
    return markdown_table(("leaves out", *(f"batch {size}" for size in choices)), rows)


def _nearest(choice: Choice) -> str:
    """How near one comes to each constraint where nothing meets all."""
    parts = []
    for limit, closest in choice.nearest.items():
        kind = KINDS[limit.name]
        value = None if closest is None else kind.value(closest)
        if closest is None or value is None:
            parts.append(f"nothing meets the others of {limit.name}")
            continue
        end = "at most" if kind.is_least else "at least"
        parts.append(f"{limit.name} is {end} {kind.write(value)} ({_named(closest)})")
    met = "with the other limits met, " if len(choice.nearest) > 1 else ""
    return f"{met}{', and '.join(parts)}"


def _matrix(data: ReportData) -> list[str]:
    sizes = data.run.batch_sizes
    rules = data.claims["selection_rules"]
    rows = []
    for wish in _WISHES:
        found = [choose(candidates(data, size), wish.constraints, wish.cost) for size in sizes]
        said = [name for rule in wish.rules for name in _as_list(rules[rule])]
        rows.append(
            (
                wish.title,
                *(_cell(choice, wish.time_s) for choice in found),
                _listed(dict.fromkeys(said)) if said else NOTHING,
            )
        )
    header = ("wanted", *(f"batch {size}" for size in sizes), "the study's rule")
    words = header[1:]
    crowded = [(choose(candidates(data, size), ()).best, size) for size in sizes]
    known = [best for best, _ in crowded if best is not None]
    fastest = max(known, key=lambda one: one.tokens_per_s, default=None)
    most = ""
    if fastest is not None:
        most = (
            f"Most tokens a second: {_named(fastest)} at batch {fastest.batch_size}, "
            f"{format_count(fastest.tokens_per_s)} tokens/s. "
        )
    return [
        f"{_chosen_among(data)} The fastest that meets a wish, with its slots a layer, its mean "
        "step (or that percentile) and its memory; what knows the future is left out. `moejax "
        "report DIR --constraint memory=500MB --constraint complexity=4` asks with limits of your "
        "own.",
        markdown_table(header, rows, words=words),
        f"{most}{_NO_SCORE} The study's rule is its advice for the like of that wish, by its own "
        "figures.",
    ]


def _cell(choice: Choice, time_s: Callable[[Candidate], float]) -> str:
    best = choice.best
    if best is None:
        return "nothing"
    costs = f"{format_seconds(time_s(best))}, {format_bytes(best.memory_bytes)}"
    return f"{_named(best)}: {link(costs, best.place)}"


def _chosen_among(data: ReportData) -> str:
    sizes = data.run.further.get("capacities")
    if sizes is None:
        return (
            "Chosen among the strategies of this run, all with the same slots; `moejax bench "
            "--full` adds other cache sizes to choose from."
        )
    slots = sorted({cell.slots for cell in sizes.cells})
    draws = sizes.settings.get("num_runs")
    return (
        f"Chosen among the strategies of this run with its own slots and with "
        f"{', '.join(str(one) for one in slots)} a layer, all on the same draws of requests "
        f"({draws})."
    )


def _named(one: Candidate) -> str:
    if one.strategy == KEEPS_NOTHING:
        return f"`{one.strategy}`"
    return f"`{one.strategy}` with {one.slots:g} slot{'' if one.slots == 1 else 's'}"


def _as_list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)
