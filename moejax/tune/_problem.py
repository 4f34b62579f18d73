"""The question a tuner answers: hit curves, a clock, tier costs and byte budgets.

An exclusive hierarchy of LRU tiers (a hit moves the expert to the device, the evicted one cascades
down) is one LRU stack cut at `c1`, `c1 + c2` and `c1 + c2 + c3`. So one curve a layer, misses
against slots, says what every tier serves. Other stack algorithms (LFU, the oracle) obey the same
law; for the rest it is an approximation below the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.cards import Hardware, ModelSpec
from moejax.cost import (
    LayerClock,
    copy_s,
    expert_compute_s,
    from_hardware,
    layer_clock,
    workspace_bytes,
)
from moejax.errors import InfeasibleBudgetError, UsageError
from moejax.units import format_bytes

# What a desktop with 64 GB can pin, and what a larger one can hold besides.
DEFAULT_PINNED_BYTES = 32 * 10**9
DEFAULT_HOST_BYTES = 64 * 10**9

_MAX_LANDING = 16
# More steps make the p99 objective slow: 512 take about 8 s on two cores.
_MAX_SAMPLES = 512


class TierNumbers(NamedTuple):
    """What the predicted step latency depends on; one pytree, seconds and bytes.

    Attributes:
      num_misses: Expected misses of one step against retained slots, never rising; column 0 is
        the demand itself.
      any_miss_ratio: Share of steps in which a layer misses any expert, against retained slots.
      sample_misses: Misses of single steps, or None; needed for the p99 objective.
      num_tokens: (token, expert) pairs of one step.
      clock: Times of one layer.
      pageable_s: One expert from pageable host memory to the device.
      store_s: One expert from the store to the device.
      recall_ratio: Chance that a prefetched expert is demanded.
      window_s: Link time a prefetch may use before the demand it is meant for.
      max_landing: Landing slots of one layer beyond which prefetching cannot pay.
      budgets_bytes: Bytes for expert slots on the device, in pinned and in pageable host memory.
    """

    num_misses: Float[Array, "layers slots"]
    any_miss_ratio: Float[Array, "layers slots"]
    sample_misses: Float[Array, "samples layers slots"] | None
    num_tokens: Float[Array, " layers"]
    clock: LayerClock
    pageable_s: Float[Array, " layers"]
    store_s: Float[Array, " layers"]
    recall_ratio: Float[Array, " layers"]
    window_s: Float[Array, " layers"]
    max_landing: Float[Array, ""]
    budgets_bytes: Float[Array, "3"]


@dataclass(frozen=True)
class TierProblem:
    """A tuning question with the names and exact byte counts its answer repeats.

    Attributes:
      numbers: What the prediction depends on.
      model: Card name of the model.
      hardware: Name of the hardware profile.
      strategy: Strategy whose hit curve this is.
      expert_bytes: Bytes of one expert of each layer.
      budget_bytes: Device bytes as asked for.
      fixed_bytes: Device bytes taken by dense weights, KV cache, workspace and one staging expert;
        0 when the budget counts expert slots only.
      slot_budgets_bytes: What is left for slots on the device, in pinned and pageable memory.
      check_misses: Misses of steps that the plan is not tuned on, for an honest percentile.
    """

    numbers: TierNumbers
    model: str
    hardware: str
    strategy: str
    expert_bytes: tuple[int, ...]
    budget_bytes: int
    fixed_bytes: int
    slot_budgets_bytes: tuple[int, int, int]
    check_misses: Float[Array, "samples layers slots"] | None

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.numbers.num_misses.shape[0]

    @property
    def num_experts(self) -> int:
        """Experts of one layer."""
        return self.numbers.num_misses.shape[1] - 1


def tier_problem(
    hardware: Hardware,
    model: ModelSpec,
    hit_ratio: Float[np.ndarray, "layers slots"],
    num_demands: Float[np.ndarray, " layers"],
    *,
    budget_bytes: int,
    pinned_budget_bytes: int = DEFAULT_PINNED_BYTES,
    host_budget_bytes: int = DEFAULT_HOST_BYTES,
    strategy: str = "lru",
    batch_size: int = 1,
    context_tokens: int = 512,
    expert_bytes: Sequence[int] | None = None,
    include_dense: bool = False,
    recall_ratio: float | Sequence[float] = 0.0,
    lookahead_depth: int = 1,
    sample_misses: Float[np.ndarray, "samples layers slots"] | None = None,
) -> TierProblem:
    """States the tuning question for one strategy on one machine.

    Args:
      hardware: Profile that prices copies and compute.
      model: Card of the model.
      hit_ratio: Share of a layer's demands that hit with 0, 1, ..., `num_experts` slots. For plans
        of a running system take the convention in which a first touch hits while a slot is free
        (`hit_ratio_warm`): a tier that holds every expert then misses nothing.
      num_demands: Mean distinct experts one step demands of each layer.
      budget_bytes: Device bytes.
      pinned_budget_bytes: Pinned host bytes for slots.
      host_budget_bytes: Pageable host bytes for slots. The store below holds every expert.
      strategy: Name of the strategy whose curve this is.
      batch_size: Requests that decode in lockstep.
      context_tokens: Tokens in the KV cache of each request.
      expert_bytes: Bytes of one expert of each layer; by default those of the card.
      include_dense: Whether dense weights, KV cache, workspace and one staging expert are paid
        from `budget_bytes` too.
      recall_ratio: Chance that a predicted expert is demanded, of each layer or of all but the
        first, which nothing precedes in its step.
      lookahead_depth: Layers ahead that predictions are made. At 1 a prefetch has only the next
        layer's attention to hide behind, deeper it has a whole layer.
      sample_misses: Misses of single steps against slots, for the p99 objective. Of evenly spaced
        ones half are tuned on and half tell the percentile: tuned on 500 steps of recorded
        DeepSeek-V2-Lite routing, about half of the gain in p99 was gone on other steps.

    Raises:
      UsageError: A budget or ratio is out of range, or the curve is not of this model.
      InfeasibleBudgetError: The budget holds not even the smallest plan.
    """
    hit_ratio = np.asarray(hit_ratio, np.float64)
    num_demands = np.asarray(num_demands, np.float64)
    _check_curve(model, hit_ratio, num_demands)
    _check_ranges(budget_bytes, pinned_budget_bytes, host_budget_bytes, lookahead_depth)
    num_layers = len(hit_ratio)
    if expert_bytes is None:
        expert_bytes = [model.expert_bytes] * num_layers
    sizes = np.asarray(expert_bytes, np.int64)
    if sizes.shape != (num_layers,):
        raise UsageError(
            f"{len(sizes)} expert sizes were given for {num_layers} layers",
            "Give one size in bytes for each MoE layer.",
        )
    fixed_bytes = 0
    if include_dense:
        fixed_bytes = fixed_device_bytes(model, batch_size, context_tokens, int(sizes.max()))
    check_feasible(budget_bytes, fixed_bytes, int(sizes.max()))
    clock = layer_clock(
        hardware,
        model,
        batch_size=batch_size,
        context_tokens=context_tokens,
        expert_bytes=sizes,
        strategy=strategy,
    )
    parameters = from_hardware(hardware)
    num_tokens = jnp.full(num_layers, float(batch_size * model.num_experts_per_tok))
    recall = _layer_recall(recall_ratio, num_layers)
    window_s = clock.attention_s + jnp.zeros(num_layers)
    if lookahead_depth > 1:
        window_s += clock.shared_s + expert_compute_s(
            clock.expert_read_s,
            clock.expert_token_s,
            jnp.asarray(num_demands, jnp.float32),
            num_tokens,
        )
    slot_budgets_bytes = (budget_bytes - fixed_bytes, pinned_budget_bytes, host_budget_bytes)
    tuned_misses, check_misses = _halves(sample_misses)
    numbers = TierNumbers(
        num_misses=_falling(num_demands[:, None] * (1.0 - hit_ratio)),
        any_miss_ratio=_any_miss(num_demands[:, None] * (1.0 - hit_ratio), tuned_misses),
        sample_misses=tuned_misses,
        num_tokens=num_tokens,
        clock=clock,
        pageable_s=jnp.asarray(copy_s(parameters, clock.expert_bytes, "pageable")),
        store_s=jnp.asarray(copy_s(parameters, clock.expert_bytes, "nvme")),
        recall_ratio=jnp.asarray(recall, jnp.float32),
        window_s=window_s,
        max_landing=_max_landing(recall, np.asarray(clock.copy_s), np.asarray(window_s)),
        budgets_bytes=jnp.asarray(slot_budgets_bytes, jnp.float32),
    )
    return TierProblem(
        numbers=numbers,
        model=model.name,
        hardware=hardware.name,
        strategy=strategy,
        expert_bytes=tuple(int(size) for size in sizes),
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        slot_budgets_bytes=slot_budgets_bytes,
        check_misses=check_misses,
    )


def _check_curve(
    model: ModelSpec, hit_ratio: Float[np.ndarray, "..."], num_demands: Float[np.ndarray, "..."]
) -> None:
    expected = (model.num_moe_layers, model.num_experts + 1)
    if hit_ratio.shape != expected or num_demands.shape != expected[:1]:
        raise UsageError(
            f"a hit curve of shape {hit_ratio.shape} with demands of {num_demands.shape} is not "
            f"one of {model.name}, which has {expected[0]} MoE layers of {expected[1] - 1} experts",
            "Give the card of the model whose routing the trace records with --model.",
        )
    if not (np.all(hit_ratio >= 0) and np.all(hit_ratio <= 1) and np.all(num_demands >= 0)):
        raise UsageError("a hit curve leaves the range from 0 to 1, or a demand is negative")


def _check_ranges(
    budget_bytes: int, pinned_budget_bytes: int, host_budget_bytes: int, lookahead_depth: int
) -> None:
    budgets = {
        "device": budget_bytes,
        "pinned": pinned_budget_bytes,
        "pageable host": host_budget_bytes,
    }
    for name, value in budgets.items():
        if value < 0:
            raise UsageError(f"the {name} budget is {value} bytes", "Give zero or more bytes.")
    if lookahead_depth < 1:
        raise UsageError(f"a lookahead of {lookahead_depth} layers", "Look at least 1 layer ahead.")


def fixed_device_bytes(
    model: ModelSpec, batch_size: int, context_tokens: int, largest_expert_bytes: int
) -> int:
    """Bytes of a device beside slots: dense weights, KV cache, workspace and a staging expert."""
    kv_bytes = batch_size * context_tokens * model.kv_bytes_per_token
    scratch_bytes = workspace_bytes(model, batch_size)
    return model.dense_bytes + kv_bytes + scratch_bytes + largest_expert_bytes


def check_feasible(budget_bytes: int, fixed_bytes: int, largest_expert_bytes: int) -> None:
    """Refuses a device budget that holds not even the smallest plan.

    Raises:
      InfeasibleBudgetError: The hint names the smallest one.
    """
    # The staging expert is part of `fixed_bytes` where those count.
    smallest_bytes = fixed_bytes or largest_expert_bytes
    if budget_bytes < smallest_bytes:
        what = (
            "the dense weights, KV cache, workspace and one staging expert"
            if fixed_bytes
            else "one expert"
        )
        raise InfeasibleBudgetError(
            f"a device budget of {format_bytes(budget_bytes)} does not hold {what}",
            f"The smallest feasible budget is {smallest_bytes} bytes "
            f"({format_bytes(smallest_bytes)}).",
        )


def _layer_recall(
    recall_ratio: float | Sequence[float], num_layers: int
) -> Float[np.ndarray, " layers"]:
    recall = np.array(np.broadcast_to(np.asarray(recall_ratio, np.float64), num_layers))
    if not (np.all(recall >= 0) and np.all(recall <= 1)):
        raise UsageError(
            f"a recall of {recall.min():g} to {recall.max():g}", "Recall lies between 0 and 1."
        )
    if np.ndim(recall_ratio) == 0:
        recall[0] = 0.0
    return recall


def _falling(num_misses: Float[np.ndarray, "*batch slots"]) -> Float[Array, "*batch slots"]:
    # FIFO and its kin may miss more with more slots; such slots are better left idle.
    return jnp.asarray(np.minimum.accumulate(num_misses, axis=-1), jnp.float32)


def _halves(
    sample_misses: Float[np.ndarray, "samples layers slots"] | None,
) -> tuple[Array | None, Array | None]:
    if sample_misses is None:
        return None, None
    num_kept = min(len(sample_misses), 2 * _MAX_SAMPLES)
    kept = np.linspace(0, len(sample_misses) - 1, num_kept).round().astype(int)
    # A single step has to serve for both.
    return _falling(sample_misses[kept[::2]]), _falling(sample_misses[kept[num_kept > 1 :: 2]])


def _any_miss(
    num_misses: Float[np.ndarray, "layers slots"],
    sample_misses: Float[Array, "samples layers slots"] | None,
) -> Float[Array, "layers slots"]:
    """Counted where single steps are known; else as if each demand missed by itself."""
    if sample_misses is not None:
        return _falling(np.minimum(np.asarray(sample_misses), 1.0).mean(0))
    num_demands = np.maximum(num_misses[:, :1], 1e-9)
    hit_ratio = np.clip(1.0 - num_misses / num_demands, 0.0, 1.0)
    return _falling(1.0 - hit_ratio**num_demands)


def _max_landing(
    recall_ratio: Float[np.ndarray, " layers"],
    copy_s: Float[np.ndarray, " layers"],
    window_s: Float[np.ndarray, " layers"],
) -> Float[Array, ""]:
    num_copies = np.arange(_MAX_LANDING + 1)[:, None]
    late_s = np.maximum(0.0, num_copies * copy_s - window_s)
    saved_s = recall_ratio * num_copies * copy_s - late_s
    return jnp.asarray(np.argmax(saved_s, axis=0).max(), jnp.float32)
