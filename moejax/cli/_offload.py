"""Running a model whose routed experts wait in host memory: options, plans, and what to say."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import typer

from moejax.errors import BackendError, UsageError
from moejax.units import format_bytes, format_ratio

from ._generation import NamedCheckpoint, WeightType, load_model, weight_dtype
from ._offload_strategy import make_strategies
from ._options import parse_size, prepare_devices
from ._progress import say, show_progress
from .simulate import Scope

if TYPE_CHECKING:
    from moejax.devices import Team
    from moejax.engine import Generation, OffloadEngine
    from moejax.offload import ExpertLayout, ExpertStore, SlotPlan
    from moejax.qwen_moe import QwenMoeConfig

DEFAULT_STRATEGY = "lru"

# Attention to a longer prompt takes a block of queries at a time.
_MOST_QUERIES = 2048


class Kernels(enum.StrEnum):
    """How a step is computed."""

    auto = "auto"
    pallas = "pallas"
    xla = "xla"


BudgetOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Device bytes for routed experts, such as 6GB; the others wait in host memory.",
    ),
]
SlotsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--slots",
        metavar="N",
        help="Experts of each layer on the device (of all layers with --scope pool), instead of "
        "--budget.",
    ),
]
PlanOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="FILE", help="Slots as `tune-cache --out` wrote them, and its strategy."
    ),
]
ScopeOption: TypeAlias = Annotated[
    Scope | None,
    typer.Option("--scope", help="Slots for each layer, or one pool for all; default: layer."),
]
StrategyOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help=f"Which experts stay on the device; default: the plan's, else {DEFAULT_STRATEGY}.",
    ),
]
IncludeDenseOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--include-dense",
        help="Other weights, the KV cache and workspace are paid from --budget too.",
    ),
]
ProfileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="Trace that the strategy learns from."),
]
KernelsOption: TypeAlias = Annotated[
    Kernels | None,
    typer.Option("--kernels", help="GPU kernels, or plain JAX; default: auto, what the GPU can."),
]


SharingOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--devices",
        min=1,
        metavar="N",
        help="Devices that share the experts, each with the slots; parts of a CPU without GPUs.",
    ),
]


class OffloadOptions(NamedTuple):
    """What was given on the command line; None and empty where it was not."""

    budget: str
    slots: int | None
    plan: Path | None
    scope: Scope | None
    strategy: str | None
    include_dense: bool
    profile: Path | None
    kernels: Kernels | None
    devices: int = 1


class Opened(NamedTuple):
    """A model with its experts in host memory, ready to run.

    Attributes:
      engine: The model.
      strategy: Name of what chooses the experts that stay.
      plan: How many do, on each device.
      layout: How experts are packed, in rows whose fetches are counted.
      num_devices: How many share them.
    """

    engine: "OffloadEngine"
    strategy: str
    plan: "SlotPlan"
    layout: "ExpertLayout"
    num_devices: int


def is_offloaded(options: OffloadOptions) -> bool:
    """Whether experts are to wait in host memory.

    Raises:
      UsageError: Options contradict each other, or have no meaning without another.
    """
    sizes = {"--budget": options.budget, "--slots": options.slots, "--plan": options.plan}
    given = [name for name, value in sizes.items() if value not in (None, "")]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", "Give one of them.")
    if options.include_dense and not options.budget:
        raise UsageError("--include-dense has no meaning without --budget", "Add --budget SIZE.")
    others = {
        "--strategy": options.strategy,
        "--scope": options.scope,
        "--profile": options.profile,
        "--kernels": options.kernels,
        "--devices": options.devices if options.devices > 1 else None,
    }
    idle = [name for name, value in others.items() if value is not None]
    if idle and not given:
        raise UsageError(
            f"{idle[0]} has no meaning with every expert on the device",
            "Add --budget SIZE, --slots N or --plan FILE.",
        )
    return bool(given)


def open_offloaded(
    checkpoint: NamedCheckpoint,
    weight_type: WeightType,
    options: OffloadOptions,
    *,
    num_tokens: int,
    max_new_tokens: int,
) -> Opened:
    """Reads a model with its routed experts into host memory; what cannot work fails before.

    Args:
      checkpoint: The model.
      weight_type: What weights become.
      options: What was asked for.
      num_tokens: Length of the prompt.
      max_new_tokens: Length of the answer.

    Raises:
      UsageError: A strategy, a profile, a plan or a number of slots cannot be used with the model.
      InfeasibleBudgetError: The budget does not hold one expert.
      BadFileError: The weights, the plan or the profile are corrupt.
      BackendError: Kernels were asked for without a GPU, or host memory cannot hold the experts.
    """
    import jax

    from moejax.devices import team
    from moejax.engine import OffloadEngine, prepare_model
    from moejax.offload import ExpertLayout, describe_cliff
    from moejax.qwen_moe.params import check

    kernels = options.kernels or Kernels.auto
    prepare_devices(options.devices)
    if kernels is Kernels.pallas and jax.default_backend() != "gpu":
        raise BackendError("--kernels pallas needs an NVIDIA GPU", "Use --kernels xla, or auto.")
    config = checkpoint.config
    if not config.moe_layers:
        raise UsageError(
            f"{checkpoint.name} has no routed experts", "Leave out --budget, --slots and --plan."
        )
    if options.devices > config.num_experts:
        raise UsageError(
            f"{config.num_experts} experts cannot be dealt out among {options.devices} devices",
            f"Use 1 to {config.num_experts} devices.",
        )
    members = team(options.devices)
    check(checkpoint.files)
    dtype = weight_dtype(checkpoint, weight_type)
    layout = ExpertLayout(
        config.num_experts, config.hidden_size, config.moe_intermediate_size, dtype
    )
    plan, planned_for = _make_plan(
        checkpoint,
        layout.share(options.devices),
        options,
        num_tokens=num_tokens,
        max_new_tokens=max_new_tokens,
    )
    name = options.strategy or planned_for or DEFAULT_STRATEGY
    strategies = make_strategies(name, config, options.profile, options.devices)
    cliff = describe_cliff(
        plan,
        num_layers=len(config.moe_layers),
        # On the average device; more on some.
        num_demands=-(-config.num_experts_per_tok // options.devices),
        expert_bytes=layout.expert_bytes,
    )
    if cliff is not None:
        say(f"warning: {cliff}")
    if jax.default_backend() == "cpu":
        say("no GPU: running on the CPU, with every expert in its memory")
    network = load_model(checkpoint, weight_type, routed_experts=False)
    model = prepare_model(network, kernels.value)
    store = read_store(checkpoint, layout, members)
    engine = OffloadEngine(model, store, plan, strategies, kernels=kernels.value)
    return Opened(engine, name, plan, layout, options.devices)


def describe_offload(opened: Opened, generation: "Generation") -> dict[str, Any]:
    """What the device held, and what had to be fetched in the decode steps."""
    import numpy as np

    from moejax.engine import COUNTS

    counts = np.asarray(generation.counts)
    total = dict(zip(COUNTS, counts.sum(axis=(0, 1)).tolist(), strict=True))
    num_steps = len(counts)
    fetched_bytes = total["fetched_rows"] * opened.layout.row_bytes
    return {
        "strategy": opened.strategy,
        "scope": opened.plan.scope,
        "slots": list(opened.plan.slots),
        "devices": opened.num_devices,
        "kernels": opened.engine.kernels,
        "hit_ratio": total["hits"] / total["demands"] if total["demands"] else None,
        "num_hits": total["hits"],
        "num_late": total["late"],
        "num_misses": total["misses"],
        "fetched_bytes_per_step": fetched_bytes / num_steps if num_steps else None,
        "device_bytes": dict(opened.engine.device_bytes),
    }


def say_offload(facts: dict[str, Any]) -> None:
    """The same for the person who waited."""
    num_slots = sum(facts["slots"])
    where = "in one pool" if facts["scope"] == "pool" else f"over {len(facts['slots'])} layers"
    where += f" on each of {facts['devices']} devices" if facts["devices"] > 1 else ""
    parts = [f"{facts['strategy']} with {num_slots:,} slots {where}"]
    if facts["hit_ratio"] is not None:
        parts += [
            f"hits {format_ratio(facts['hit_ratio'])}",
            f"late {facts['num_late']:,}",
            f"misses {facts['num_misses']:,}",
            f"fetched {format_bytes(facts['fetched_bytes_per_step'])} a token",
        ]
    say(", ".join(parts))


def _make_plan(
    checkpoint: NamedCheckpoint,
    layout: "ExpertLayout",
    options: OffloadOptions,
    *,
    num_tokens: int,
    max_new_tokens: int,
) -> tuple["SlotPlan", str | None]:
    """The plan, and the strategy that it was made for, if any."""
    from moejax.offload import even_plan, fixed_bytes, read_plan

    config = checkpoint.config
    scope = (options.scope or Scope.layer).value
    num_layers = len(config.moe_layers)
    if options.plan is not None:
        stored = read_plan(
            options.plan,
            model=checkpoint.name,
            num_layers=num_layers,
            num_experts=layout.num_experts,
            scope=scope,
            num_devices=options.devices,
        )
        return stored.plan, stored.strategy
    fixed = 0
    if options.include_dense:
        dense_bytes, kv_bytes = _dense_bytes(config, layout.dtype)
        fixed = fixed_bytes(
            dense_bytes=dense_bytes,
            kv_bytes_per_token=kv_bytes,
            batch_size=1,
            num_positions=_num_positions(num_tokens, max_new_tokens),
            workspace_bytes=_workspace_bytes(config, layout, num_tokens),
        )
        say(f"of the budget {format_bytes(fixed)} are for other weights, KV cache and workspace")
    plan = even_plan(
        num_layers,
        layout.num_experts,
        expert_bytes=layout.expert_bytes,
        slots=options.slots,
        budget_bytes=parse_size(options.budget, "--budget") if options.budget else None,
        fixed_bytes=fixed,
        scope=scope,
    )
    return plan, None


def read_store(
    checkpoint: NamedCheckpoint, layout: "ExpertLayout", members: "Team | None" = None
) -> "ExpertStore":
    """The routed experts in host memory, told while they are read."""
    from moejax.devices import ONE_DEVICE
    from moejax.offload import build_store
    from moejax.qwen_moe.params import read_layer_experts

    config = checkpoint.config

    def read_layer(number: int):
        layer = config.moe_layers[number]
        return read_layer_experts(checkpoint.files, config, layer, layout.dtype)

    with show_progress("loading experts into host memory") as progress:
        return build_store(
            layout,
            len(config.moe_layers),
            read_layer,
            team=members or ONE_DEVICE,
            on_progress=lambda done, all_: progress(done // 10**6, all_ // 10**6, "MB"),
        )


def _dense_bytes(config: "QwenMoeConfig", dtype: str) -> tuple[int, int]:
    """Bytes of all weights but the routed experts, and of one token's keys and values."""
    import math

    import jax.numpy as jnp
    from flax import nnx

    from moejax.qwen_moe import RoutedExperts, abstract

    flat = nnx.to_flat_state(nnx.state(abstract(config, dtype)))
    dense = [v.get_value() for _, v in flat if not isinstance(v, RoutedExperts)]
    kv_width = 2 * config.num_key_value_heads * config.head_dim
    return (
        sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in dense),
        config.num_hidden_layers * kv_width * jnp.dtype(dtype).itemsize,
    )


def _num_positions(num_tokens: int, max_new_tokens: int) -> int:
    from moejax.engine._programs import cache_bucket, prompt_bucket

    return cache_bucket(prompt_bucket(num_tokens) + max_new_tokens - 1)


def _workspace_bytes(config: "QwenMoeConfig", layout: "ExpertLayout", num_tokens: int) -> int:
    """Two layers of experts that pass by while the prompt is read, and what it is read into.

    The rest is float32 at most: the last token's logits, the rows that all chosen experts are
    given and give, and the scores of one block of queries before and after the softmax.
    """
    from moejax.engine._programs import prompt_bucket

    tokens = prompt_bucket(num_tokens)
    rows = tokens * config.num_experts_per_tok * (3 * layout.ffn + 2 * layout.hidden)
    scores = 2 * config.num_attention_heads * min(tokens, _MOST_QUERIES) * tokens
    return 2 * layout.layer_bytes + 4 * (config.vocab_size + rows + scores)
