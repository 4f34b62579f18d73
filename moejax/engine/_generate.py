"""One batch of requests, from the prompts to the last token of the longest text."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt, UInt8

from moejax.errors import BackendError

from ._programs import Place, Routed

# What was read before is the engine's own affair.
Prefill = Callable[[], tuple[Any, Place, Array, Routed | None]]
Decode = Callable[[Any, Place], tuple[Any, Place, Routed | None]]


class Step(NamedTuple):
    """The next token of every request.

    Attributes:
      token_ids: Tokens; of a request that has ended they mean nothing.
      is_live: Whether the token belongs to the request's text, a stop token included.
    """

    token_ids: Int32[np.ndarray, " batch"]
    is_live: Bool[np.ndarray, " batch"]


@dataclass
class Timing:
    """How long a generation took, as its caller saw it.

    Attributes:
      compile_s: Compilation before the start; 0 where every program was there already.
      ttft_s: From the start until the first token was on the host; NaN before that. The first
        run of a fresh program also sets it up (0.2 s for 24 layers on a CPU).
      step_s: From each token's arrival on the host to the next one's. What the caller does in
        between is part of it where it takes longer than the device.
    """

    compile_s: float
    ttft_s: float = math.nan
    step_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class RequestRouting:
    """Where the router sent the tokens of one request.

    Only a token that was read has been routed, and the last token of a text is never read: it is
    not among these.

    Attributes:
      token_ids: The tokens that were read: the prompt, then all new tokens but the last.
      phase: 0 for a token of the prompt, 1 for a new one.
      experts: Chosen experts in each layer that has them, best first.
      routing_weights: What each counts.
      lookahead: What the gates of the next layers would choose, see `Trace`; None if not asked.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    phase: UInt8[np.ndarray, " tokens"]
    experts: UInt[np.ndarray, "tokens layers topk"]
    routing_weights: Float32[np.ndarray, "tokens layers topk"]
    lookahead: UInt[np.ndarray, "tokens layers depth width"] | None


class Generation:
    """Texts in the making: iterate over it to get them token by token.

    The device runs ahead: a token is read only when the steps after it are under way, so steps
    follow each other without a gap. The price is that a few steps are computed in vain where
    every request has met a stop token.

    Args:
      prompts: What each request begins with.
      prefill: Reads the prompts.
      decode: Takes one step; may use up the cache that it is given.
      max_new_tokens: Tokens after which a text ends.
      stop_token_ids: Tokens that end a text.
      compile_s: What compilation took.
      num_ahead: Steps that are under way when a token is read.
      read_counts: Gives what the first so many calls of `decode` counted of the experts.

    Attributes:
      token_ids: New tokens of each request so far, its stop token included.
      finish_reasons: `stop`, `length`, or None for a request that goes on.
      timing: See `Timing`.
    """

    def __init__(
        self,
        prompts: Sequence[Int32[np.ndarray, " tokens"]],
        prefill: Prefill,
        decode: Decode,
        *,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        compile_s: float,
        num_ahead: int,
        read_counts: Callable[[int], np.ndarray] | None = None,
    ):
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.finish_reasons: list[str | None] = [None for _ in prompts]
        self.timing = Timing(compile_s)
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._logits: Array | None = None
        self._routed: list[Routed] = []
        self._read_counts = read_counts
        self._steps = self._run(prefill, decode, num_ahead)

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def finish(self) -> Self:
        """Takes the steps that are left."""
        for _ in self._steps:
            pass
        return self

    @property
    def prompt_logits(self) -> Float32[np.ndarray, "batch vocab"] | None:
        """Scores behind the last token of each prompt; None before the first step."""
        return None if self._logits is None else np.asarray(self._logits)

    @property
    def routing(self) -> tuple[RequestRouting, ...]:
        """Routing of each request so far; empty where it is not recorded or not begun."""
        if not self._routed:
            return ()
        return tuple(self._request_routing(request) for request in range(len(self._prompts)))

    @property
    def counts(self) -> Int32[np.ndarray, "steps layers counts"] | None:
        """What was counted of the experts, step by step; None where all are on the device.

        The steps are those behind the tokens read so far; the first token is the prompt's.
        """
        if self._read_counts is None:
            return None
        return self._read_counts(len(self.timing.step_s))

    def _run(self, prefill: Prefill, decode: Decode, num_ahead: int) -> Iterator[Step]:
        last_s = time.perf_counter()
        cache, place, self._logits, routed = prefill()
        unread = deque([_send(place, routed)])
        num_begun = 1
        while unread:
            while num_begun < self._max_new_tokens and len(unread) <= num_ahead:
                cache, place, routed = decode(cache, place)
                unread.append(_send(place, routed))
                num_begun += 1
            token_ids, routed = unread.popleft()
            step = self._take(np.asarray(token_ids), routed)
            now_s = time.perf_counter()
            if math.isnan(self.timing.ttft_s):
                if self._logits is not None:
                    check_logits(np.asarray(self._logits))
                self.timing.ttft_s = now_s - last_s
            else:
                self.timing.step_s.append(now_s - last_s)
            last_s = now_s
            yield step
            if all(self.finish_reasons):
                return

    def _take(self, token_ids: np.ndarray, routed: Routed | None) -> Step:
        is_live = np.array([reason is None for reason in self.finish_reasons])
        for request in np.flatnonzero(is_live):
            text = self.token_ids[request]
            text.append(int(token_ids[request]))
            if text[-1] in self._stop_token_ids:
                self.finish_reasons[request] = "stop"
            elif len(text) == self._max_new_tokens:
                self.finish_reasons[request] = "length"
        if routed is not None:
            self._routed.append(jax.device_get(routed))
        return Step(token_ids, is_live)

    def _request_routing(self, request: int) -> RequestRouting:
        own = [jax.tree.map(lambda array: array[request], routed) for routed in self._routed]
        return join_routing(self._prompts[request], self.token_ids[request], own)


def join_routing(
    prompt: Int32[np.ndarray, " tokens"], text: Sequence[int], routed: Sequence[Routed]
) -> RequestRouting:
    """The routing of one request from that of its prompt, with padding, and of its steps."""
    new = np.array(text[:-1], np.int32)

    def gather(arrays: Sequence[Any]) -> np.ndarray:
        read, *steps = arrays[: 1 + new.size]
        return np.concatenate([read[: prompt.size], *steps])

    has_lookahead = routed[0].lookahead is not None
    return RequestRouting(
        token_ids=np.concatenate([prompt, new]),
        phase=np.repeat(np.array([0, 1], np.uint8), [prompt.size, new.size]),
        experts=gather([step.experts for step in routed]),
        routing_weights=gather([step.routing_weights for step in routed]),
        lookahead=gather([step.lookahead for step in routed]) if has_lookahead else None,
    )


def check_logits(logits: Float32[np.ndarray, "batch vocab"]) -> None:
    """Refuses to go on with weights that overflow; they would choose token 0 for ever.

    Raises:
      BackendError: A score is not finite.
    """
    if not np.isfinite(logits).all():
        raise BackendError(
            "the logits behind the prompt are not finite",
            "The weights overflow their type: load them with --dtype float32 or bfloat16.",
        )


def _send(place: Place, routed: Routed | None) -> tuple[Array, Routed | None]:
    """Sets what the host will read on its way there."""
    for array in jax.tree.leaves((place.token_ids, routed)):
        array.copy_to_host_async()
    return place.token_ids, routed
