"""What a ladder measures: a few cases for a fit, and cases of other routing for it to predict."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moejax.errors import UsageError
from moejax.qwen_moe import QwenMoeConfig
from moejax.trace import TRACES
from moejax.workloads import WORKLOADS

from ._engine_case import EngineCase
from ._engine_recipes import RoutingRecipe

LADDER_SHARES = (0.5, 0.13, 0.27, 0.75)
"""Shares of a layer's experts that have a slot."""

_FIT_SEED, _HELD_OUT_SEED = 0, 1
_RATIOS = (1.0, 0.9, 0.75, 0.5, 0.0)
_BATCH_RATIOS = (1.0, 0.75, 0.5)
_FORESEEN_RATIO = 0.9


class PlannedCase(NamedTuple):
    """A case, what its routing is made from, and whether the profile may be fitted to it."""

    case: EngineCase
    recipe: RoutingRecipe
    is_fit: bool


def ladder_plan(
    config: QwenMoeConfig,
    model: str,
    strategies: Sequence[str],
    batch_sizes: Sequence[int],
    num_steps: int,
    *,
    slots: Sequence[int] = (),
) -> list[PlannedCase]:
    """Every case, those of one batch size and strategy beside each other: they share a program.

    The fit sees routing made for chosen hit ratios, of which each strategy meets one that misses
    nothing; every strategy with every number of slots is held out, on requests to the model.

    Args:
      config: Shape of the model.
      model: Card of the model, whose routing the requests are.
      strategies: What is held out; `lru` is fitted in any case.
      batch_sizes: Requests that decode in lockstep.
      num_steps: Steps of a case, with those before the timed ones.
      slots: Of a layer, of the held-out cases; none takes `LADDER_SHARES`.

    Raises:
      UsageError: No trace and no workload is of this model.
    """
    source = _routing_of(model)
    shares = (max(1, round(share * config.num_experts)) for share in LADDER_SHARES)
    counts = tuple(dict.fromkeys(slots or shares))
    held_out = RoutingRecipe("requests", num_steps, _HELD_OUT_SEED, source=source)
    half = max(config.num_experts // 2, config.num_experts_per_tok)
    made = RoutingRecipe("hit_ratio", num_steps, _FIT_SEED, source=source, slots=half)

    def planned(recipe: RoutingRecipe, count: int, *, is_fit: bool) -> PlannedCase:
        case = EngineCase(name, count, "layer", size, recipe.label())
        return PlannedCase(case, recipe, is_fit)

    found: list[PlannedCase] = []
    for size in dict.fromkeys((1, *batch_sizes)):
        for name in dict.fromkeys(("lru", *strategies)):
            recipes = _fitted(made, name, size, config.num_experts_per_tok)
            found += [planned(recipe, half, is_fit=True) for recipe in dict.fromkeys(recipes)]
            if name in strategies and size in batch_sizes:
                found += [planned(held_out, count, is_fit=False) for count in counts]
    return found


def _fitted(
    made: RoutingRecipe, strategy: str, batch_size: int, topk: int
) -> Iterator[RoutingRecipe]:
    """What the fit sees: hit ratios of `lru`, and what another strategy adds to a step."""
    if strategy == "lru" and batch_size == 1:
        yield from (made._replace(hit_ratio=ratio) for ratio in _RATIOS)
    elif strategy == "lru":
        most = min(batch_size * topk, made.slots)
        for ratio in _BATCH_RATIOS:
            yield made._replace(hit_ratio=ratio, num_distinct=most)
        # Fewer experts at once, and nothing missed: what one of them takes.
        yield made._replace(hit_ratio=1.0, num_distinct=topk)
    elif batch_size == 1:
        yield made._replace(hit_ratio=1.0)
        if strategy == "gate_look":
            yield made._replace(kind="foreseeable", hit_ratio=_FORESEEN_RATIO)


def _routing_of(model: str) -> str:
    """The trace of this model, or the workload that is made after it."""
    if model in TRACES:
        return model
    own = [name for name, workload in WORKLOADS.items() if workload.model == model]
    if not own:
        raise UsageError(
            f"no trace and no workload is of {model}", "Name a model that has one with --model."
        )
    return own[0]
