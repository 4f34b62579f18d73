"""What is asked of the engine, and what a run of `bench_engine.py` says to it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from moejax.strategies import STRATEGIES

Row: TypeAlias = dict[str, Any]

LRU_LIMITS = {1.0: 1.34, 0.9: 1.15, 0.0: 1.08}
BATCH_LIMITS = {1.0: 1.5, 0.9: 1.15}
STRATEGY_LIMIT = 1.05
HOST_FACTOR, TRANSFORMERS_FACTOR, FORESIGHT_FACTOR = 4.0, 12.0, 1.2
CONTEXT_LIMIT, PREFILL_LIMIT = 1.3, 1.15
DRIFT_LIMIT, MEMORY_LIMIT = 0.02, 1.02
# A routing of 90 % hits is one of 89 to 91 %.
_NEAR = 0.015


class Goal(NamedTuple):
    """One thing that is asked.

    Attributes:
      what: In words.
      limit: What is asked, in words.
      found: What was measured, in words; empty where nothing was.
      is_met: Whether that is enough; None where nothing was measured.
    """

    what: str
    limit: str
    found: str = ""
    is_met: bool | None = None


def goals(results: Row) -> list[Goal]:
    """Every goal, in the order of the acceptance list."""
    return [
        *_exact(results),
        *_over_bound(results),
        _strategies(results),
        *_baselines(results),
        _foresight(results),
        *_rest(results),
    ]


def find(
    results: Row,
    *,
    strategy: str = "lru",
    scope: str = "layer",
    batch_size: int = 1,
    hit_ratio: float | None = None,
    routing: str | None = None,
) -> Row | None:
    """The first replayed record of this kind; None if there is none."""
    return next(
        (
            row
            for row in results["engine"]
            if row["replayed"]
            and (row["strategy"], row["scope"], row["batch_size"]) == (strategy, scope, batch_size)
            and (hit_ratio is None or abs(row["hit_ratio"] - hit_ratio) < _NEAR)
            and (hit_ratio is None or not is_foreseeable(row))
            and (routing is None or row["routing"] == routing)
        ),
        None,
    )


def is_foreseeable(row: Row) -> bool:
    """Whether its routing was made so that misses can be foreseen."""
    return row["routing"].startswith("foreseeable")


def pairs_with_lru(results: Row) -> list[tuple[Row, Row]]:
    """Each record without misses beside that of `lru` with slots for each layer, same routing."""
    found = []
    for row in results["engine"]:
        if row["misses_per_step"] or row["batch_size"] != 1 or not row["replayed"]:
            continue
        if is_foreseeable(row):
            continue
        base = find(results, routing=row["routing"])
        if base is not None and base is not row and base["slots"] == row["slots"]:
            found.append((row, base))
    return found


def pairs_of_foresight(results: Row) -> list[tuple[Row, Row]]:
    """Each record that could foresee its misses, beside `lru` on the same routing."""
    rows = [row for row in results["engine"] if is_foreseeable(row) and row["strategy"] != "lru"]
    found = [(row, find(results, routing=row["routing"])) for row in rows]
    return [(row, base) for row, base in found if base is not None]


def median_s(row: Row) -> float:
    """The step time of a record."""
    return row["step_s"]["median"]


def _exact(results: Row) -> Iterator[Goal]:
    checks = results.get("checks", [])
    num_same = sum(row["bit_identical"] for row in checks)
    num_steps = min((row["num_identity_steps"] for row in checks), default=0)
    missing = sorted(set(STRATEGIES) - {row["strategy"] for row in checks})
    words = f"{num_same} of {len(checks)} cases, {num_steps} steps each"
    if missing:
        words += f"; not checked here: {', '.join(missing)}"
    yield _goal(
        "Tokens and logits as with every expert in a slot",
        "bit-identical over 64 steps",
        words,
        num_same == len(checks) and num_steps >= 64 and not missing,
        is_known=bool(checks),
    )
    told = [row for row in results["engine"] if row["simulator_counts_equal"] is not None]
    num_equal = sum(row["simulator_counts_equal"] for row in told)
    words = f"{num_equal} of {len(told)} cases"
    yield _goal(
        "Hits, late, misses and rows, event by event",
        "equal to the simulator's",
        words,
        num_equal == len(told),
        is_known=bool(told),
    )


def _over_bound(results: Row) -> Iterator[Goal]:
    wanted = [(1, ratio, limit) for ratio, limit in LRU_LIMITS.items()]
    wanted += [(size, ratio, limit) for size in (4, 16) for ratio, limit in BATCH_LIMITS.items()]
    for size, ratio, limit in wanted:
        row = find(results, batch_size=size, hit_ratio=ratio)
        yield _at_most(
            f"`lru`, batch {size}, {100 * ratio:.0f} % hits: step over the sum bound",
            limit,
            None if row is None else row["bound_sum_ratio"],
        )


def _strategies(results: Row) -> Goal:
    pairs = pairs_with_lru(results)
    what = "Other strategies and the pool: step over that of `lru`, all hits"
    if not pairs:
        return Goal(what, f"at most {STRATEGY_LIMIT:g}")
    ratio, row = max(
        ((median_s(row) / median_s(base), row) for row, base in pairs), key=lambda pair: pair[0]
    )
    name = f"{ratio:.3f} (`{row['strategy']}`, {row['scope']})"
    return _goal(what, f"at most {STRATEGY_LIMIT:g}", name, ratio <= STRATEGY_LIMIT)


def _baselines(results: Row) -> Iterator[Goal]:
    for what, script, ratio, factor in (
        ("host-driven loop at 90 % hits", "host_driven_decode", 0.9, HOST_FACTOR),
        ("transformers, resident, all hits", "transformers_decode", 1.0, TRANSFORMERS_FACTOR),
    ):
        ours, theirs = find(results, hit_ratio=ratio), fastest(results, script, ratio)
        yield _at_least(
            f"Times as fast as the {what}",
            factor,
            None if ours is None or theirs is None else median_s(theirs) / median_s(ours),
        )


def fastest(results: Row, script: str, hit_ratio: float, batch_size: int = 1) -> Row | None:
    """The fastest row of a baseline at about a hit ratio; None if there is none."""
    rows = [
        row
        for row in results["baselines"]
        if row["script"] == script
        and row.get("batch_size") == batch_size
        and row.get("kind", "decode") == "decode"
        and "step_s" in row
        # Its own rule among equals misses a little more or less on the same routing.
        and abs(row["hit_ratio"] - hit_ratio) < 2 * _NEAR
    ]
    return min(rows, key=median_s, default=None)


def _foresight(results: Row) -> Goal:
    pairs = pairs_of_foresight(results)
    best = max((median_s(base) / median_s(row) for row, base in pairs), default=None)
    return _at_least("Prefetch of foreseeable misses: times as fast", FORESIGHT_FACTOR, best)


def _rest(results: Row) -> Iterator[Goal]:
    contexts = [row for row in results.get("contexts", []) if row["bound_ratio"] is not None]
    worst = max((row["bound_ratio"] for row in contexts), default=None)
    yield _at_most("What longer contexts add, over their bytes", CONTEXT_LIMIT, worst)
    prefill = results.get("prefill")
    tokens = f"{prefill['num_tokens']:,}" if prefill else "2,048"
    yield _at_most(
        f"Prompt of {tokens} tokens over the larger bound",
        PREFILL_LIMIT,
        None if prefill is None else prefill["bound_ratio"],
    )
    drift = results.get("drift")
    yield _at_most(
        "Drift of the step time over 2,000 steps",
        DRIFT_LIMIT,
        None if drift is None else abs(drift["drift_ratio"]),
    )
    memory = results.get("memory")
    yield _at_most(
        "Device memory over the plan",
        MEMORY_LIMIT,
        None if memory is None else memory["state_ratio"],
    )


def _at_most(what: str, limit: float, found: float | None) -> Goal:
    if found is None:
        return Goal(what, f"at most {limit:g}")
    return _goal(what, f"at most {limit:g}", f"{found:.3f}", found <= limit)


def _at_least(what: str, limit: float, found: float | None) -> Goal:
    if found is None:
        return Goal(what, f"at least {limit:g}")
    return _goal(what, f"at least {limit:g}", f"{found:.2f}", found >= limit)


def _goal(what: str, limit: str, found: str, is_met: bool, *, is_known: bool = True) -> Goal:
    return Goal(what, limit, found, is_met) if is_known else Goal(what, limit)


def unmet(found: Sequence[Goal]) -> list[Goal]:
    """Goals that were measured and missed."""
    return [goal for goal in found if goal.is_met is False]
