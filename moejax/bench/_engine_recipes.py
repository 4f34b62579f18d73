"""Recipes of replayed routing: small enough for a record, and enough to make the routing again."""

from typing import Literal, NamedTuple

import numpy as np

from moejax.cards import load_model
from moejax.errors import UsageError
from moejax.qwen_moe import QwenMoeConfig
from moejax.strategies import Profile, learn_profile
from moejax.trace import TRACES, Trace, batch_trace, find_trace, load_trace

from ._engine_steps import Routing
from ._engine_traces import foreseeable_trace, trace_of_hit_ratio, true_lookahead
from ._requests import Requests, batch_lookahead, draw_run, learn, open_requests

_PROFILE_TOKENS = 256


class RoutingRecipe(NamedTuple):
    """What routing is made from; the same recipe gives the same routing at a batch size.

    Attributes:
      kind: `hit_ratio` and `foreseeable` are made for so many slots, `requests` are drawn from a
        workload or a trace that comes with moejax.
      num_steps: Decode steps.
      seed: Seed of all draws.
      source: Workload or trace of `requests`; of the others what strategies learned from
        beforehand, or empty.
      slots: Slots of a layer that the ratio holds for; 0 of `requests`.
      hit_ratio: Share of the demands that hit; 0 of `requests`.
      num_distinct: Different experts that an event demands; None for as many as possible.
    """

    kind: Literal["hit_ratio", "foreseeable", "requests"]
    num_steps: int
    seed: int
    source: str = ""
    slots: int = 0
    hit_ratio: float = 0.0
    num_distinct: int | None = None

    def label(self) -> str:
        """The name of the routing in results."""
        if self.kind == "requests":
            return f"{self.source}, seed {self.seed}"
        if self.kind == "foreseeable":
            return f"foreseeable misses of {self.slots} slots"
        hits = f"{100 * self.hit_ratio:g} % hits of {self.slots} slots"
        return hits if self.num_distinct is None else f"{hits}, {self.num_distinct} experts"


def make_routing(
    recipe: RoutingRecipe, config: QwenMoeConfig, model: str, batch_size: int
) -> Routing:
    """The routing of a recipe for a model of this shape.

    Args:
      recipe: What it is made from.
      config: Shape of the model.
      model: Card of the model, whose routing `requests` are.
      batch_size: Requests that decode in lockstep.

    Raises:
      UsageError: The recipe is not possible for this model.
    """
    shape = (len(config.moe_layers), config.num_experts, config.num_experts_per_tok)
    if recipe.kind == "requests":
        return _from_requests(recipe, open_recipe(recipe, model), shape, batch_size)
    if recipe.kind == "foreseeable":
        experts = foreseeable_trace(
            recipe.num_steps, *shape, recipe.slots, recipe.hit_ratio, seed=recipe.seed
        )
    else:
        experts = trace_of_hit_ratio(
            recipe.num_steps,
            *shape,
            batch_size,
            recipe.slots,
            recipe.hit_ratio,
            num_distinct=recipe.num_distinct,
            seed=recipe.seed,
        )
    return Routing(recipe.label(), experts, true_lookahead(experts, batch_size))


def make_profile(recipe: RoutingRecipe, config: QwenMoeConfig, model: str) -> Profile:
    """What strategies learn before they meet the routing of a recipe.

    Of a source: requests that no routing holds. Otherwise nothing true, but as much as of a trace.
    """
    if recipe.source:
        return learn(open_recipe(recipe, model))
    experts = trace_of_hit_ratio(
        _PROFILE_TOKENS,
        len(config.moe_layers),
        config.num_experts,
        config.num_experts_per_tok,
        batch_size=1,
        slots=config.num_experts // 2,
        hit_ratio=0.5,
        seed=recipe.seed + 1,
    )
    return learn_profile(Trace(experts, config.num_experts, np.array([0, _PROFILE_TOKENS])))


def open_recipe(recipe: RoutingRecipe, model: str) -> Requests:
    """Where the requests of a recipe come from.

    Raises:
      UsageError: The source is unknown or of another shape than the model's card.
    """
    spec = load_model(model)
    trace = load_trace(find_trace(recipe.source)) if recipe.source in TRACES else None
    # The profile is of one seed: runs of all seeds are judged by the same knowledge.
    return open_requests(trace, recipe.source, spec, seed=0)


def _from_requests(
    recipe: RoutingRecipe, requests: Requests, shape: tuple[int, int, int], batch_size: int
) -> Routing:
    trace = draw_run(requests, recipe.seed, num_places=batch_size, num_steps=recipe.num_steps)
    theirs = (trace.num_layers, trace.num_experts, trace.topk)
    if theirs != shape:
        raise UsageError(
            f"{recipe.source} has (layers, experts, topk) {theirs}, the model {shape}",
            "Measure the whole model, or name routing of its own.",
        )
    experts = batch_trace(trace, batch_size, num_steps=recipe.num_steps)
    return Routing(recipe.label(), experts, batch_lookahead(trace, batch_size, recipe.num_steps))
