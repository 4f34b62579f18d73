"""The strategy that chooses the experts on the device, and what it learns from a profile."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.errors import UsageError

from ._progress import say

if TYPE_CHECKING:
    from moejax.qwen_moe import QwenMoeConfig
    from moejax.strategies import Strategy
    from moejax.trace import Trace


def make_strategies(
    name: str, config: "QwenMoeConfig", path: Path | None, num_devices: int = 1
) -> "list[Strategy]":
    """The strategy of each device, which counts its own share of the profile.

    How much each feature of reuse weighs is learned once, from all of the profile: the devices run
    one program.

    Raises:
      UsageError: It is not known, reads the future, or needs a profile that was not given or is
        of another model.
      BadFileError: The profile is corrupt.
    """
    from moejax.strategies import STRATEGIES, learn_profile
    from moejax.trace import share_of

    if name not in STRATEGIES:
        raise UsageError(f"--strategy: {name!r} is not known", f"Known: {', '.join(STRATEGIES)}.")
    kind = STRATEGIES[name]
    if kind.needs_future:
        raise UsageError(
            f"--strategy: {name} reads the future, which only a replayed trace has",
            "Take another one here; `moejax bench --engine --replay TRACE` runs it.",
        )
    if path is None and kind.needs_profile:
        raise UsageError(
            f"--strategy: {name} learns from a profile and none was given",
            "Give --profile FILE, such as `moejax trace record` writes.",
        )
    if path is None and kind.learns:
        say(f"note: no --profile, so {name} starts knowing nothing")
    taught = None if path is None else read_profile(path, config)
    if taught is None or not kind.learns:
        return [kind.make(None)] * num_devices
    profile = learn_profile(taught)
    if num_devices == 1:
        return [kind.make(profile)]
    # Every device has room for as many experts as the one that owns most.
    num_own = -(-config.num_experts // num_devices)
    shares = [
        replace(share_of(taught, device, num_devices), num_experts=num_own)
        for device in range(num_devices)
    ]
    weights = profile.reuse_weights
    return [kind.make(learn_profile(share)._replace(reuse_weights=weights)) for share in shares]


def read_profile(path: Path, config: "QwenMoeConfig") -> "Trace":
    """A trace of the same model, to learn from.

    Raises:
      UsageError: It is of another model.
      BadFileError: It cannot be read.
    """
    from moejax.trace import load_trace

    trace = load_trace(path)
    ours = (len(config.moe_layers), config.num_experts, config.num_experts_per_tok)
    theirs = (trace.num_layers, trace.num_experts, trace.topk)
    if theirs != ours:
        raise UsageError(
            f"the profile has (layers, experts, topk) {theirs}, the model {ours}",
            "Give a profile of the same model.",
        )
    return trace
