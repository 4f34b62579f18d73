"""From routing to a plan, for the commands that tune."""

from typing import TYPE_CHECKING, cast

from moejax.errors import UsageError
from moejax.units import parse_bytes

if TYPE_CHECKING:
    from moejax.cards import Hardware, ModelSpec
    from moejax.simulate import HitCurve
    from moejax.trace import Trace
    from moejax.tune import Certainty, DevicesPlan, Objective, Plan, TierProblem

_SAMPLE_STEPS = 1024
_MAX_STEPS = 4096
DEFAULT_PINNED, DEFAULT_HOST = "32GB", "64GB"


def make_plan(
    routing: "Trace",
    spec: "ModelSpec",
    hardware: "Hardware",
    budget_bytes: int,
    *,
    pinned_budget_bytes: int = parse_bytes(DEFAULT_PINNED),
    host_budget_bytes: int = parse_bytes(DEFAULT_HOST),
    strategy: str = "lru",
    objective: str = "latency",
    batch_size: int = 1,
    context_tokens: int = 512,
    include_dense: bool = False,
    seed: int = 0,
) -> "tuple[Plan, Certainty | None]":
    """Tunes the tiers for a model, a machine and the routing of a trace.

    Returns:
      The plan, and how sure it is; None if the profile does not say.

    Raises:
      BadFileError: The trace is not this model's.
      InfeasibleBudgetError: The budget holds not even the smallest plan.
    """
    from moejax.bench import check_shape
    from moejax.trace import statistics
    from moejax.tune import certainty, tier_problem, tune

    check_shape(routing, spec)
    recall_ratio = statistics(routing).next_layer_recall_ratio or 0.0

    def problem_of(name: str) -> "TierProblem":
        curve = _curve(routing, name, batch_size, seed)
        return tier_problem(
            hardware,
            spec,
            curve.hit_ratio_warm,
            curve.num_demands / curve.num_steps,
            budget_bytes=budget_bytes,
            pinned_budget_bytes=pinned_budget_bytes,
            host_budget_bytes=host_budget_bytes,
            strategy=name,
            batch_size=batch_size,
            context_tokens=context_tokens,
            expert_bytes=None if routing.expert_bytes is None else routing.expert_bytes.tolist(),
            include_dense=include_dense,
            recall_ratio=recall_ratio,
            sample_misses=curve.step_misses,
        )

    problem = problem_of(strategy)
    plan = tune(problem, objective=cast("Objective", objective), seed=seed)
    if hardware.uncertainty is None:
        return plan, None
    return plan, certainty(
        plan,
        problem,
        None if strategy == "lru" else problem_of("lru"),
        hardware,
        spec,
        batch_size=batch_size,
        context_tokens=context_tokens,
        seed=seed,
    )


def make_devices_plan(
    routing: "Trace",
    spec: "ModelSpec",
    hardware: "Hardware",
    budget_bytes: int,
    num_devices: int,
    *,
    pinned_budget_bytes: int = parse_bytes(DEFAULT_PINNED),
    strategy: str = "lru",
    batch_size: int = 1,
    context_tokens: int = 512,
    include_dense: bool = False,
    seed: int = 0,
) -> "DevicesPlan":
    """Tunes the slots of several devices that share the experts, each with the budget.

    The other arguments are those of `make_plan`.

    Raises:
      BadFileError: The trace is not this model's.
      InfeasibleBudgetError: A budget holds not even the smallest plan.
      UsageError: The strategy is not `lru`, or there are more devices than experts.
    """
    from moejax.bench import check_shape
    from moejax.simulate import lru_hit_curve
    from moejax.trace import batch_trace, share_of
    from moejax.tune import devices_problem, tune_devices

    check_shape(routing, spec)
    if strategy != "lru":
        raise UsageError(
            f"the slower of several devices needs the misses of single steps, and {strategy} tells "
            "only their mean",
            "Only the closed form of lru has them: use --strategy lru, or --devices 1.",
        )

    shares = [share_of(routing, device, num_devices) for device in range(num_devices)]
    curves = [
        lru_hit_curve(
            batch_trace(share, batch_size, num_steps=_MAX_STEPS),
            share.num_experts,
            keep_steps=_SAMPLE_STEPS,
        )
        for share in shares
    ]
    problem = devices_problem(
        hardware,
        spec,
        [curve.step_misses_warm for curve in curves],
        budget_bytes=budget_bytes,
        pinned_budget_bytes=pinned_budget_bytes,
        strategy=strategy,
        batch_size=batch_size,
        context_tokens=context_tokens,
        expert_bytes=None if routing.expert_bytes is None else routing.expert_bytes.tolist(),
        include_dense=include_dense,
    )
    alone, _ = make_plan(
        routing,
        spec,
        hardware,
        budget_bytes,
        pinned_budget_bytes=pinned_budget_bytes,
        strategy=strategy,
        batch_size=batch_size,
        context_tokens=context_tokens,
        include_dense=include_dense,
        seed=seed,
    )
    return tune_devices(problem, alone.step_latency_s)


def _curve(trace: "Trace", strategy: str, batch_size: int, seed: int) -> "HitCurve":
    import jax

    from moejax.simulate import hit_curve, lru_hit_curve
    from moejax.strategies import STRATEGIES, learn_profile
    from moejax.trace import batch_trace, split_profile

    if strategy == "lru":
        experts = batch_trace(trace, batch_size, num_steps=_MAX_STEPS)
        return lru_hit_curve(experts, trace.num_experts, keep_steps=_SAMPLE_STEPS)
    profile, test = split_profile(trace, 0.3)
    experts = batch_trace(test, batch_size, num_steps=_MAX_STEPS // 4)
    kind = STRATEGIES[strategy]
    made = kind.make(learn_profile(profile) if kind.learns else None)
    return hit_curve(made, experts, trace.num_experts, jax.random.key(seed), topk=trace.topk)
