"""`moejax bench --engine --ladder`: cases for a profile of this machine, and others to judge it."""

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from moejax.errors import UsageError

from ._engine_bench import MAX_BATCH, EngineOptions, find_model
from ._engine_measure import Fit, measure_cases
from ._options import parse_ints, parse_names
from ._output import OutputFormat
from ._progress import say

_STRATEGIES, _BATCH_SIZES = "lru,intelligent", "1,4"
_NUM_STEPS, _QUICK_STEPS = 128, 32
# Tokens behind a request, for what attention takes, and the steps taken there.
_SHORT, _LONG, _CONTEXT_STEPS = 32, 2048, 80
# Made by a ladder itself, or told by it in another way.
_OWN = ("scopes", "replay", "prompts", "profile", "check")

LadderOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--ladder",
        help="With --engine: cases to fit a profile of this machine to, and at four capacities "
        "others that it is to predict; then `moejax validate --against DIR`.",
    ),
]


def bench_ladder(options: EngineOptions, folder: Path, output: OutputFormat, *, fit: Fit) -> None:
    """Measures both kinds of cases, and fits this machine's profile to the first.

    Args:
      options: What to measure.
      folder: Where results.json goes.
      output: Format on stdout.
      fit: Stores a profile fitted to what was measured of the machine.

    Raises:
      UsageError: Options contradict each other or the model, or no routing is of this model.
      BadFileError: The model is corrupt.
      BackendError: Host memory cannot hold the experts.
    """
    from moejax.bench import (
        EngineSettings,
        describe_bench,
        ladder_plan,
        make_profile,
        make_routing,
        measure_contexts,
        open_bench,
    )
    from moejax.strategies import STRATEGIES

    given = [name for name in _OWN if getattr(options, name) is not None]
    if given:
        raise UsageError(
            f"--{given[0]} has no meaning for a ladder", f"Leave out --{given[0]} or --ladder."
        )
    strategies = parse_names(options.strategies or _STRATEGIES, "--strategies", tuple(STRATEGIES))
    sizes = parse_ints(
        options.batch_sizes or _BATCH_SIZES, "--batch-sizes", minimum=1, maximum=MAX_BATCH
    )
    slots = () if options.slots is None else parse_ints(options.slots, "--slots", minimum=1)
    config, open_rig, checkpoint = find_model(options)
    if slots and max(slots) > config.num_experts:
        raise UsageError(
            f"--slots {max(slots)} exceeds the {config.num_experts} experts of a layer",
            f"Give at most {config.num_experts}.",
        )
    num_steps = options.num_steps or (_QUICK_STEPS if options.quick else _NUM_STEPS)
    settings = EngineSettings(num_steps=num_steps, is_checked=False, seed=options.seed)
    model = str(options.model or "tiny-moe") if checkpoint is None else checkpoint.name
    plan = ladder_plan(config, model, strategies, sizes, settings.num_all_steps, slots=slots)
    held_out = next(one.recipe for one in plan if not one.is_fit)
    bench = open_bench(open_rig(), settings, make_profile(held_out, config, model))
    # One engine of a strategy serves all numbers of slots, and compiles once for a batch size.
    bench.num_allocated = config.num_experts
    say(f"{len(plan)} cases, of which the fit sees {sum(one.is_fit for one in plan)}")
    wanted = dict.fromkeys((one.recipe, one.case.batch_size) for one in plan)
    routings = {
        (recipe.label(), size): make_routing(recipe, config, model, size) for recipe, size in wanted
    }
    results = _go_on(folder / "results.json", describe_bench(bench) | {"trace": None})
    if "contexts" not in results:
        contexts = (_SHORT, min(_LONG, config.max_position_embeddings - _SHORT - _CONTEXT_STEPS))
        engine = bench.engine(plan[0].case)
        results["contexts"] = measure_contexts(
            bench.rig, engine, bench.sizes, bench.ceilings, contexts
        )
    marks = [{"fit": one.is_fit, "recipe": one.recipe._asdict()} for one in plan]
    measure_cases(
        bench,
        [one.case for one in plan],
        results,
        options,
        folder,
        output,
        routings=routings,
        marks=marks,
        fit=fit,
    )
    say(f"next: moejax validate --against {folder}")


def _go_on(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The results of the same command before, which may have been interrupted.

    Raises:
      UsageError: What lies there is of another command.
    """
    from moejax.results import read_json, to_plain

    if not path.exists():
        return results
    before = read_json(path)
    same = ("schema", "model", "settings")
    if not isinstance(before, dict) or any(
        before.get(name) != to_plain(results[name]) for name in same
    ):
        raise UsageError(f"{path} is of another run", "Name another folder with --out.")
    say(f"{len(before['engine'])} cases are there already")
    return {**before, "failed": []}
