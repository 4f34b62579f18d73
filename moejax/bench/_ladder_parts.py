"""What the parts of a step were measured to take, from cases that differ in one thing only.

- experts: cases of `lru` that miss nothing, one batch size, different numbers of experts: the
  slope. One request always demands as many; there the slope of the smallest batch stands.
- attention: steps at several contexts: the slope over keys and values, by request.
- fixed: what cases that miss nothing take beside both, and what the strategy takes more than `lru`.
- copy: what a case takes beside all of these.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moejax.cost import CountedCase

from ._engine_fit import Row


class Contrasts(NamedTuple):
    """What was measured by differences.

    Attributes:
      expert_s: One routed expert, by batch size.
      token_s: One token of one request's keys and values; None without several contexts.
      layers_s: A step without routed experts at no context, by batch size.
      strategy_s: What a strategy adds to a step, by strategy.
    """

    expert_s: dict[int, float]
    token_s: float | None
    layers_s: dict[int, float]
    strategy_s: dict[str, float]

    def parts(self, case: CountedCase) -> dict[str, float]:
        """What is known of a case; empty where a contrast is missing."""
        size = case.batch_size
        if self.token_s is None or size not in self.layers_s or size not in self.expert_s:
            return {}
        found = {
            "experts": self.expert_s[size] * case.num_demands,
            "attention": self.token_s * size * case.context_tokens,
            "fixed": self.layers_s[size] + self.strategy_s.get(case.strategy, 0.0),
        }
        return {**found, "copy": case.step_s - sum(found.values())}


def find_contrasts(results: Row, cases: Sequence[CountedCase]) -> Contrasts:
    """Takes the differences that a run holds."""
    kinds = [(row["scope"], bool(row["replayed"])) for row in results["engine"]]
    hits = [
        case
        for case, kind in zip(cases, kinds, strict=True)
        if kind == ("layer", True) and case.is_all_hit
    ]
    lru = [case for case in hits if case.strategy == "lru"]
    by_size = {
        size: [case for case in lru if case.batch_size == size]
        for size in sorted({case.batch_size for case in lru})
    }
    expert_s = _expert_times(by_size)
    token_s = _token_time(results.get("contexts") or ())
    layers_s = {}
    for size, group in by_size.items():
        if size in expert_s and token_s is not None:
            rest_s = [
                case.step_s
                - expert_s[size] * case.num_demands
                - token_s * size * case.context_tokens
                for case in group
            ]
            layers_s[size] = float(np.median(rest_s))
    return Contrasts(expert_s, token_s, layers_s, _strategy_times(hits, by_size.get(1, [])))


def _expert_times(by_size: dict[int, list[CountedCase]]) -> dict[int, float]:
    found = {}
    for size, group in by_size.items():
        num_demands = np.array([case.num_demands for case in group])
        if len(np.unique(num_demands.round())) > 1:
            step_s = [case.step_s for case in group]
            found[size] = float(np.polyfit(num_demands, step_s, 1)[0])
    if found and 1 in by_size and 1 not in found:
        found[1] = found[min(found)]
    return found


def _token_time(contexts: Sequence[Row]) -> float | None:
    if len(contexts) < 2:
        return None
    tokens = [row["context"] for row in contexts]
    return float(np.polyfit(tokens, [row["step_s"]["median"] for row in contexts], 1)[0])


def _strategy_times(hits: Sequence[CountedCase], lru: Sequence[CountedCase]) -> dict[str, float]:
    if not lru:
        return {}
    base_s = float(np.median([case.step_s for case in lru]))
    ours = [case for case in hits if case.batch_size == 1 and case.strategy != "lru"]
    return {case.strategy: case.step_s - base_s for case in ours}
