"""What may be asked of an engine; everything is refused before the first token is computed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from moejax.errors import UsageError
from moejax.offload import ExpertStore, SlotPlan
from moejax.qwen_moe import Lookahead, QwenMoeConfig
from moejax.strategies import Strategy

from ._programs import ProgramSettings, cache_bucket, prompt_bucket
from ._sampling import Sampling

_MAX_SEED = 2**32 - 1


def check_generation(
    config: QwenMoeConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    record: bool,
    lookahead: Lookahead | None,
) -> tuple[list[Int32[np.ndarray, " tokens"]], ProgramSettings]:
    """The prompts of one batch as arrays, and what its programs are compiled for.

    Raises:
      UsageError: A prompt is empty, too long or holds what is no token, or another argument is
        out of range.
    """
    arrays = check_prompts(config, prompts, max_new_tokens)
    check_seed(seed)
    if record:
        check_recording(config, lookahead)
    bucket = prompt_bucket(max(prompt.size for prompt in arrays))
    return arrays, ProgramSettings(
        batch_size=len(arrays),
        num_tokens=bucket,
        # By the bucket, not by the longest prompt: one cache length for all of its prompts.
        num_positions=cache_bucket(bucket + max_new_tokens - 1),
        is_greedy=sampling.is_greedy,
        is_recording=record,
        lookahead=lookahead if record else None,
    )


def check_prompts(
    config: QwenMoeConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Int32[np.ndarray, " tokens"]]:
    """The prompts as arrays.

    Raises:
      UsageError: There is none, one is empty, too long or holds what is no token, or no new token
        is asked for.
    """
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens are none", "Use 1 or more.")
    if not len(prompts):
        raise UsageError("there is no prompt", "Give at least one.")
    return [_check_prompt(config, prompt, i, max_new_tokens) for i, prompt in enumerate(prompts)]


def check_seed(seed: int) -> None:
    """Refuses what is no seed.

    Raises:
      UsageError: The seed does not fit 32 bits.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise UsageError(f"seed {seed} does not fit 32 bits", f"Use 0 to {_MAX_SEED}.")


def check_recording(config: QwenMoeConfig, lookahead: Lookahead | None) -> None:
    """Refuses what cannot be recorded of a model.

    Raises:
      UsageError: The model has no routed experts, or the lookahead is out of range.
    """
    if not config.moe_layers:
        raise UsageError("no layer of the model has routed experts", "Use a model that has some.")
    if lookahead is None:
        return
    if lookahead.depth < 1:
        raise UsageError(f"a lookahead of {lookahead.depth} layers is none", "Use 1 or more.")
    if not 1 <= lookahead.width <= config.num_experts:
        raise UsageError(
            f"a lookahead of {lookahead.width} experts is not possible",
            f"A layer has {config.num_experts}: use 1 to {config.num_experts}.",
        )


def check_fit(config: QwenMoeConfig, store: ExpertStore, plan: SlotPlan) -> None:
    """Refuses experts or slots that are not of a model.

    Raises:
      UsageError: They are not.
    """
    layout, num_layers = store.layout, len(config.moe_layers)
    have = (len(store.layers), layout.num_experts, layout.hidden, layout.ffn)
    want = (num_layers, config.num_experts, config.hidden_size, config.moe_intermediate_size)
    if have != want:
        raise UsageError(
            f"a store of {have} layers, experts, hidden and ffn is not of this model: {want}",
            "Build the store from the checkpoint of the model.",
        )
    num_experts = layout.share(store.team.num_devices).num_experts
    if plan.scope == "layer" and (len(plan.slots) != num_layers or max(plan.slots) > num_experts):
        raise UsageError(
            f"a plan of {len(plan.slots)} layers and up to {max(plan.slots)} slots does not "
            f"fit {num_layers} layers of {num_experts} experts on a device",
            "Make a plan of this model.",
        )


def one_each(strategy: Strategy | Sequence[Strategy], num_devices: int) -> tuple[Strategy, ...]:
    """Strategies given for all devices or for each, as one for each.

    Raises:
      UsageError: There are more or fewer than devices.
    """
    if isinstance(strategy, Strategy):
        return (strategy,) * num_devices
    if len(strategy) != num_devices:
        raise UsageError(
            f"{len(strategy)} strategies were given for {num_devices} device(s)",
            "Give one for all devices, or one for each.",
        )
    return tuple(strategy)


def _check_prompt(
    config: QwenMoeConfig, prompt: Sequence[int], number: int, max_new_tokens: int
) -> Int32[np.ndarray, " tokens"]:
    token_ids = np.asarray(prompt)
    if token_ids.size == 0:
        raise UsageError(f"prompt {number} is empty", "A text begins with at least one token.")
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        raise UsageError(
            f"prompt {number} is no list of token numbers: {str(prompt)[:60]}",
            "Turn text into tokens with the model's tokenizer.",
        )
    wrong = token_ids[(token_ids < 0) | (token_ids >= config.vocab_size)]
    if wrong.size:
        raise UsageError(
            f"prompt {number} holds token {wrong[0]}, but the vocabulary has {config.vocab_size}",
            "Use the tokenizer that came with the model.",
        )
    # The last new token is never read, so it needs no position.
    num_positions = token_ids.size + max_new_tokens - 1
    if num_positions > config.max_position_embeddings:
        raise UsageError(
            f"prompt {number} has {token_ids.size} tokens: with {max_new_tokens} new ones it is "
            f"longer than the model's {config.max_position_embeddings} positions",
            "Shorten the prompt or ask for fewer new tokens.",
        )
    return token_ids.astype(np.int32)
