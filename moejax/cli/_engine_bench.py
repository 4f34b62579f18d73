"""`moejax bench --engine`: an offloaded model measured on this machine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias, cast

import typer

from moejax.errors import BadFileError, UsageError

from ._engine_measure import Fit, measure_cases
from ._generation import (
    DEFAULT_CHECKPOINT,
    NamedCheckpoint,
    Prompt,
    WeightType,
    encode_prompt,
    find_checkpoint,
    load_model,
    open_text,
    read_prompts,
    weight_dtype,
)
from ._offload import Kernels, read_store
from ._offload_strategy import read_profile
from ._options import parse_ints, parse_names
from ._output import OutputFormat
from ._progress import show_progress
from ._routing import check_lookahead

if TYPE_CHECKING:
    from moejax.bench import Rig, Routing
    from moejax.offload import Scope
    from moejax.qwen_moe import QwenMoeConfig
    from moejax.strategies import Profile
    from moejax.trace import Trace

_STRATEGIES = "lru,intelligent"
_NUM_STEPS, _QUICK_STEPS = 64, 16
_PROFILE_SHARE_RATIO = 0.3
MAX_BATCH = 16
_PROMPTS = (
    "The old lighthouse keeper climbed the stairs",
    "In mathematics, a group is a set together with",
    "def read_lines(path):",
    "Dear Sir or Madam, I am writing to",
)
_RANDOM_PROMPT_TOKENS = 16
# A card says nothing about positions, which have no size.
_MANY_POSITIONS = {"max_position_embeddings": 32768}

EngineOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--engine", help="Measure the real engine, experts in host memory, on this machine."
    ),
]
ScopesOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--scopes", metavar="NAMES", help="With --engine: layer, pool or both; default: layer."
    ),
]
NumStepsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--num-steps",
        min=1,
        help=f"With --engine: steps of a case; {_NUM_STEPS}, quick {_QUICK_STEPS}.",
    ),
]
ReplayOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--replay",
        metavar="TRACE",
        help="With --engine: routing that overrides the router, for any hit ratio without real "
        "weights.",
    ),
]
RandomWeightsOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="With --engine: the model's card is enough, weights are drawn."
    ),
]
PromptsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="With --engine: where generation begins."),
]
LearnFromOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="With --engine: trace to learn from; default: a third of the requests of --replay.",
    ),
]
KernelsOption: TypeAlias = Annotated[
    Kernels | None,
    typer.Option("--kernels", help="With --engine: GPU kernels, or plain JAX; default: auto."),
]
CheckOption: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check",
        help="With --engine: compare bits with a resident model and counts with the simulator; "
        "default: yes.",
    ),
]


class EngineOptions(NamedTuple):
    """What was given on the command line; None where it was not."""

    model: str | None
    strategies: str | None
    slots: str | None
    scopes: str | None
    batch_sizes: str | None
    num_steps: int | None
    replay: str | None
    random_weights: bool
    prompts: Path | None
    profile: Path | None
    kernels: Kernels | None
    check: bool | None
    measure: bool
    quick: bool
    seed: int


def refuse_engine_options(options: EngineOptions) -> None:
    """Refuses what says nothing to a simulated run.

    Raises:
      UsageError: An option of the engine was given without --engine.
    """
    names = ("scopes", "num_steps", "replay", "prompts", "profile", "kernels", "check")
    given = [name for name in names if getattr(options, name) is not None]
    given += ["random_weights"] if options.random_weights else []
    if given:
        name = given[0].replace("_", "-")
        raise UsageError(f"--{name} has no meaning in a simulation", "Add --engine.")


def bench_engine(
    options: EngineOptions,
    folder: Path,
    output: OutputFormat,
    *,
    fit: Fit,
) -> None:
    """Measures every case, with the results on disk after each, and prints a table.

    Args:
      options: What to measure.
      folder: Where results.json goes.
      output: Format on stdout.
      fit: Stores a profile fitted to what was measured of the machine.

    Raises:
      UsageError: Options contradict each other or the model.
      BadFileError: The model or the trace is corrupt, or they do not fit each other.
      BackendError: Host memory cannot hold the experts.
    """
    from moejax.bench import (
        ROUTER,
        EngineSettings,
        describe_bench,
        make_cases,
        open_bench,
    )
    from moejax.offload import SCOPES
    from moejax.strategies import STRATEGIES

    strategies = parse_names(options.strategies or _STRATEGIES, "--strategies", tuple(STRATEGIES))
    scopes = cast("tuple[Scope, ...]", parse_names(options.scopes or "layer", "--scopes", SCOPES))
    sizes = parse_ints(options.batch_sizes or "1", "--batch-sizes", minimum=1, maximum=MAX_BATCH)
    config, open_rig, checkpoint = find_model(options)
    slots = (max(1, config.num_experts // 2),)
    if options.slots is not None:
        slots = parse_ints(options.slots, "--slots", minimum=0)
    settings = EngineSettings(
        num_steps=options.num_steps or (_QUICK_STEPS if options.quick else _NUM_STEPS),
        is_checked=options.check is not False,
        seed=options.seed,
    )
    profile, test = _read_traces(options, config)
    check_lookahead(strategies, test)
    kinds = (ROUTER,) if test is None else (str(options.replay),)
    cases = tuple(
        make_cases(
            strategies,
            slots,
            scopes,
            sizes,
            kinds,
            num_experts=config.num_experts,
            has_profile=profile is not None,
        )
    )
    routings = {} if test is None else _batched(kinds[0], test, sizes, settings.num_all_steps)
    num_new = max(settings.num_all_steps, settings.num_check_steps) + 1
    prompts = [] if test is not None else _read_prompts(options, config, checkpoint, num_new)
    bench = open_bench(open_rig(), settings, profile)
    results = describe_bench(bench) | {"trace": _about(test)}
    measure_cases(
        bench, cases, results, options, folder, output, routings=routings, prompts=prompts, fit=fit
    )


def find_model(
    options: EngineOptions,
) -> "tuple[QwenMoeConfig, Callable[[], Rig], NamedCheckpoint | None]":
    """The model's shape, how to get it ready to be measured, and its files if they are read."""
    kernels = (options.kernels or Kernels.auto).value
    if not options.random_weights:
        checkpoint = find_checkpoint(options.model or DEFAULT_CHECKPOINT)
        _check_experts(checkpoint.config, checkpoint.name)
        return checkpoint.config, lambda: _checkpoint_rig(checkpoint, kernels), checkpoint
    name = options.model or DEFAULT_CHECKPOINT
    config = _read_card(name)
    _check_experts(config, name)

    def draw() -> "Rig":
        from moejax.bench import random_rig

        with show_progress("drawing experts") as progress:
            return random_rig(
                config,
                name=name,
                kernels=kernels,
                seed=options.seed,
                on_progress=lambda done, all_: progress(done // 10**6, all_ // 10**6, "MB"),
            )

    return config, draw, None


def _check_experts(config: "QwenMoeConfig", name: str) -> None:
    if not config.moe_layers:
        raise UsageError(f"{name} has no routed experts", "Name a model that has some.")


def _checkpoint_rig(checkpoint: NamedCheckpoint, kernels: str) -> "Rig":
    from moejax.bench import Rig
    from moejax.engine import prepare_model
    from moejax.offload import ExpertLayout

    config = checkpoint.config
    layout = ExpertLayout(
        config.num_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        weight_dtype(checkpoint, WeightType.checkpoint),
    )
    network = load_model(checkpoint, WeightType.checkpoint, routed_experts=False)
    model = prepare_model(network, kernels)
    return Rig(checkpoint.name, model, read_store(checkpoint, layout), kernels)


def _read_card(name: str) -> "QwenMoeConfig":
    from moejax.cards import MODELS, models_dir, read_card
    from moejax.qwen_moe import read_config

    path = models_dir() / f"{name}.toml" if name in MODELS else Path(name)
    fields = read_card(path / "config.json" if path.is_dir() else path)
    return read_config(_MANY_POSITIONS | fields.get("config", fields), name)


def _read_traces(
    options: EngineOptions, config: "QwenMoeConfig"
) -> "tuple[Profile | None, Trace | None]":
    """What strategies learn from, and the routing under test, which share no request."""
    from moejax.strategies import learn_profile
    from moejax.trace import load_trace, split_profile

    taught = options.profile and read_profile(options.profile, config)
    profile = learn_profile(taught) if taught else None
    if options.replay is None:
        return profile, None
    trace = load_trace(options.replay)
    ours = (len(config.moe_layers), config.num_experts, config.num_experts_per_tok)
    theirs = (trace.num_layers, trace.num_experts, trace.topk)
    if theirs != ours:
        raise BadFileError(
            f"{options.replay} has (layers, experts, topk) {theirs}, the model {ours}",
            "Name the trace's own model with --model.",
        )
    if profile is not None:
        return profile, trace
    learned_from, test = split_profile(trace, _PROFILE_SHARE_RATIO)
    return learn_profile(learned_from), test


def _batched(
    name: str, trace: "Trace", batch_sizes: Sequence[int], num_steps: int
) -> "dict[tuple[str, int], Routing]":
    from moejax.bench import Routing, batch_lookahead
    from moejax.trace import batch_trace

    routings = {}
    for size in batch_sizes:
        experts = batch_trace(trace, size, num_steps=num_steps)
        if len(experts) < num_steps:
            raise UsageError(
                f"{name} holds {len(experts)} steps at batch {size} and a case takes {num_steps}",
                "Give a longer trace, a smaller --batch-sizes or a smaller --num-steps.",
            )
        said = batch_lookahead(trace, size, num_steps)
        routings[name, size] = Routing(name, experts, said)
    return routings


def _read_prompts(
    options: EngineOptions,
    config: "QwenMoeConfig",
    checkpoint: NamedCheckpoint | None,
    max_new_tokens: int,
) -> list[list[int]]:
    """Token numbers to begin with; drawn where there is no text to be read."""
    if checkpoint is None:
        import numpy as np

        if options.prompts is not None:
            raise UsageError(
                "--prompts says nothing to random weights", "Leave out one of the two options."
            )
        shape = (MAX_BATCH, _RANDOM_PROMPT_TOKENS)
        return np.random.default_rng(options.seed).integers(0, config.vocab_size, shape).tolist()
    given = [Prompt(text, "a built-in prompt") for text in _PROMPTS]
    if options.prompts is not None:
        given = read_prompts(options.prompts)
    tokenizer = open_text(checkpoint, given)
    return [
        encode_prompt(prompt, checkpoint, tokenizer, is_chat=False, max_new_tokens=max_new_tokens)
        for prompt in given
    ]


def _about(trace: "Trace | None") -> dict[str, Any] | None:
    if trace is None:
        return None
    fields = ("model", "source", "licence", "sha256", "num_tokens", "num_requests")
    return {name: getattr(trace, name) for name in fields}
