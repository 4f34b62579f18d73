"""Rung 2 of the ladder: the timeline on the routing of a case, made again from its recipe."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.cards import Hardware, ModelSpec
from moejax.cost import layer_clock
from moejax.qwen_moe import QwenMoeConfig
from moejax.qwen_moe import read_config as read_qwen_config
from moejax.simulate import PrefetchSchedule, replay
from moejax.strategies import STRATEGIES, Profile, Strategy

from ._engine_counts import run_timeline
from ._engine_fit import Row, model_spec
from ._engine_recipes import RoutingRecipe, make_profile, make_routing
from ._engine_steps import Routing


class SimulatedSteps(NamedTuple):
    """What the timeline says of the steps that were timed.

    Attributes:
      step_s: Time of each.
      counts_equal: Whether hits, late experts, misses and fetched bytes of every step are those
        that the engine counted.
    """

    step_s: Float[np.ndarray, " steps"]
    counts_equal: bool


def simulated_steps(
    results: Row,
    hardware: Hardware,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[SimulatedSteps | None]:
    """The steps of every case; None where its routing cannot be made again, or slots are a pool.

    Args:
      results: What `describe_bench` and `run_cases` give.
      hardware: Profile of the machine.
      progress: Told the number of a case, of all, and its strategy before each.
    """
    workshop = _Workshop(results)
    rows, found = results["engine"], []
    with jax.default_device(jax.devices("cpu")[0]):
        for number, row in enumerate(rows):
            if not row.get("recipe") or "schedule" not in row or row["scope"] != "layer":
                found.append(None)
                continue
            if progress is not None:
                progress(number, len(rows), row["strategy"])
            found.append(_simulate(row, workshop, hardware))
    return found


class _Workshop:
    """Makes every routing, profile and strategy once: programs are compiled for one object each."""

    def __init__(self, results: Row):
        model = results["model"]
        self.spec: ModelSpec = model_spec(results)
        self.config: QwenMoeConfig = read_qwen_config(model["config"], model["name"])
        self.sizes: Row = results["sizes"]
        self._name: str = model["name"]
        self._routings: dict[tuple[RoutingRecipe, int], Routing] = {}
        self._profiles: dict[RoutingRecipe, Profile] = {}
        self._strategies: dict[tuple[str, str], Strategy] = {}

    def routing(self, recipe: RoutingRecipe, batch_size: int) -> Routing:
        key = (recipe, batch_size)
        if key not in self._routings:
            self._routings[key] = make_routing(recipe, self.config, self._name, batch_size)
        return self._routings[key]

    def strategy(self, name: str, recipe: RoutingRecipe) -> Strategy:
        key = (name, recipe.source)
        if key not in self._strategies:
            if recipe not in self._profiles:
                self._profiles[recipe] = make_profile(recipe, self.config, self._name)
            self._strategies[key] = STRATEGIES[name].make(self._profiles[recipe])
        return self._strategies[key]


def _simulate(row: Row, workshop: _Workshop, hardware: Hardware) -> SimulatedSteps:
    recipe = RoutingRecipe(**row["recipe"])
    routing = workshop.routing(recipe, row["batch_size"])
    spec = workshop.spec
    clock = layer_clock(
        hardware,
        spec,
        batch_size=row["batch_size"],
        context_tokens=round(row["mean_context"]),
        strategy=row["strategy"],
    )
    schedule = None if row["schedule"] is None else PrefetchSchedule(**row["schedule"])
    record = run_timeline(
        workshop.strategy(row["strategy"], recipe),
        replay(routing.experts, spec.num_experts, lookahead=routing.lookahead),
        clock,
        jnp.full(spec.num_moe_layers, row["slots"], jnp.int32),
        spec.num_experts_per_tok,
        schedule,
    )
    timed = slice(row["num_warmup_steps"], None)
    step_s = np.asarray(record.compute_s + record.stall_s).sum(-1)[timed]
    sizes = workshop.sizes
    rows_each = sizes["expert_bytes"] // sizes["row_bytes"]
    fetched_rows = record.num_misses * rows_each if schedule is None else record.num_fetched_rows
    ours = {
        "hits": record.num_hits,
        "late": record.num_late,
        "misses": record.num_misses,
        "fetched_bytes": fetched_rows * sizes["row_bytes"],
    }
    equal = all(
        np.array_equal(np.asarray(ours[name], np.int64).sum(-1)[timed], row["steps"][name])
        for name in ours
    )
    return SimulatedSteps(step_s, equal)
