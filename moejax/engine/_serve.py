"""Serving many prompts with a fixed number of places: one that comes free takes the next prompt.

Everyone in the batch takes a step at the same time, but each stands where its own text does. A
prompt is read alone, while the others wait, and what was read is put in the free place.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from moejax.errors import UsageError
from moejax.qwen_moe import KVCache, Lookahead, QwenMoeConfig

from ._check import check_generation
from ._generate import RequestRouting, check_logits, join_routing
from ._programs import Place, ProgramSettings, Routed, prompt_bucket
from ._sampling import GREEDY, Draw, Sampling, make_draw


class Servable(Protocol):
    """What an engine offers to be served with.

    Its state is a NamedTuple with the fields `kv` and `place`; others are left alone.
    """

    @property
    def config(self) -> QwenMoeConfig:
        """Sizes and settings of the model."""
        ...

    def new_state(self, batch_size: int, num_positions: int) -> Any:
        """A batch that has read nothing."""
        ...

    def read(
        self,
        settings: ProgramSettings,
        token_ids: Int32[np.ndarray, "batch tokens"],
        num_tokens: Int32[np.ndarray, " batch"],
        draw: Draw | None,
    ) -> tuple[KVCache, Place, Float[Array, "batch vocab"], Routed | None]:
        """Reads prompts, like `prefill`."""
        ...

    def advance(
        self, settings: ProgramSettings, state: Any, draw: Draw | None
    ) -> tuple[Any, Int32[Array, " batch"], Routed | None]:
        """Takes a step, like `decode`; the state is used up, the tokens outlive the new one."""
        ...


class NewToken(NamedTuple):
    """One more token of a request.

    Attributes:
      request: Number of its prompt, from 0.
      token_id: The token; a stop token too.
      finish_reason: `stop` or `length` with the last token of the text, else None.
    """

    request: int
    token_id: int
    finish_reason: str | None


class Service:
    """Texts in the making: iterate over it to get their tokens as they come; see `serve`.

    The device runs ahead, as in `Generation`: where a stop token ends a text, its place takes a
    few more steps in vain before the next prompt gets it.

    Args:
      engine: The model.
      prompts: What each request begins with.
      settings: What a step of the batch is compiled for.
      draw: How tokens are drawn; None takes the best.
      max_new_tokens: Tokens after which a text ends.
      stop_token_ids: Tokens that end a text.
      first_request: Number by which the first prompt draws.
      num_ahead: Calls that are under way when a token is read.

    Attributes:
      token_ids: New tokens of each request so far, its stop token included.
      finish_reasons: `stop`, `length`, or None for a request that waits or goes on.
      num_steps: Steps that the batch has taken so far.
    """

    def __init__(
        self,
        engine: Servable,
        prompts: Sequence[Int32[np.ndarray, " tokens"]],
        settings: ProgramSettings,
        draw: Draw | None,
        *,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        first_request: int,
        num_ahead: int,
    ):
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.finish_reasons: list[str | None] = [None for _ in prompts]
        self.num_steps = 0
        self._engine, self._prompts, self._settings, self._draw = engine, prompts, settings, draw
        self._first_request = np.int32(first_request)
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._routed: list[list[Routed]] = [[] for _ in prompts]
        self._tokens = self._run(num_ahead)

    def __iter__(self) -> Iterator[NewToken]:
        return self._tokens

    def finish(self) -> Self:
        """Serves what is left."""
        for _ in self._tokens:
            pass
        return self

    @property
    def routing(self) -> tuple[RequestRouting, ...]:
        """Routing of each request so far; empty where it is not recorded or one has not begun."""
        if not all(self._routed):
            return ()
        parts = zip(self._prompts, self.token_ids, self._routed, strict=True)
        return tuple(join_routing(*part) for part in parts)

    def _run(self, num_ahead: int) -> Iterator[NewToken]:
        engine, settings = self._engine, self._settings
        state = engine.new_state(settings.batch_size, settings.num_positions)
        waiting = deque(range(len(self._prompts)))
        # Whose place it is, and the tokens that are under way or taken for it.
        owners: list[int | None] = [None] * settings.batch_size
        num_begun = [0] * len(self._prompts)
        unread: deque[_Unread] = deque()
        while True:
            for place, owner in enumerate(owners):
                if owner is not None and self._is_over(owner, num_begun[owner]):
                    owners[place] = owner = None
                if owner is None and waiting:
                    owners[place] = request = waiting.popleft()
                    state, said = self._admit(state, place, request)
                    unread.append(said)
                    num_begun[request] = 1
            live = [o for o in owners if o is not None and num_begun[o] < self._max_new_tokens]
            if live:
                draw = self._draw_of(owners)
                state, token_ids, routed = engine.advance(settings, state, draw)
                unread.append(_send(owners, token_ids, routed))
                self.num_steps += 1
                for request in live:
                    num_begun[request] += 1
            is_last = not live and not waiting
            while len(unread) > (0 if is_last else num_ahead):
                yield from self._take(unread.popleft())
            if is_last:
                return

    def _is_over(self, request: int, num_begun: int) -> bool:
        return num_begun == self._max_new_tokens or self.finish_reasons[request] is not None

    def _admit(self, state: Any, place: int, request: int) -> tuple[Any, "_Unread"]:
        """Reads a prompt and puts it in a place."""
        prompt = self._prompts[request]
        settings = self._settings._replace(batch_size=1, num_tokens=prompt_bucket(prompt.size))
        token_ids = np.zeros((1, settings.num_tokens), np.int32)
        token_ids[0, : prompt.size] = prompt
        num_tokens = np.array([prompt.size], np.int32)
        kv, stand, logits, routed = self._engine.read(
            settings, token_ids, num_tokens, self._draw_of([request])
        )
        unread = _send([request], stand.token_ids, routed, logits)
        kv, stand = _put(state.kv, state.place, np.int32(place), kv, stand)
        return state._replace(kv=kv, place=stand), unread

    def _draw_of(self, owners: Sequence[int | None]) -> Draw | None:
        """How the requests in these places draw; a place that is free draws in vain."""
        if self._draw is None:
            return None
        numbers = [0 if owner is None else owner for owner in owners]
        return self._draw._replace(requests=self._first_request + np.array(numbers, np.int32))

    def _take(self, unread: "_Unread") -> Iterator[NewToken]:
        token_ids, routed = np.asarray(unread.token_ids), jax.device_get(unread.routed)
        if unread.logits is not None:
            check_logits(np.asarray(unread.logits))
        for place, request in enumerate(unread.owners):
            if request is None or self.finish_reasons[request] is not None:
                continue
            text = self.token_ids[request]
            text.append(int(token_ids[place]))
            if routed is not None:
                self._routed[request].append(jax.tree.map(itemgetter(place), routed))
            if text[-1] in self._stop_token_ids:
                self.finish_reasons[request] = "stop"
            elif len(text) == self._max_new_tokens:
                self.finish_reasons[request] = "length"
            yield NewToken(request, text[-1], self.finish_reasons[request])


class _Unread(NamedTuple):
    """Tokens that are under way to the host, and the requests that they belong to."""

    owners: tuple[int | None, ...]
    token_ids: Array
    routed: Routed | None
    logits: Array | None


def serve(
    engine: Servable,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_token_ids: Collection[int] = (),
    record: bool = False,
    lookahead: Lookahead | None = None,
    first_request: int = 0,
) -> Service:
    """Prepares to serve prompts in turn; the work is done as the result is iterated over.

    A request gets the tokens that it gets alone, as far as rounding leaves the choice of the same
    token. Prompts wait in their order. The programs are compiled once for each length of prompts,
    to a power of two, and once for the batch.

    Args:
      engine: The model.
      prompts: Token ids of each request, of any lengths.
      batch_size: Places; with fewer prompts some stay free.
      max_new_tokens: Tokens after which a text ends.
      sampling: How the next token is chosen.
      seed: Seed of all draws.
      stop_token_ids: Tokens that end a text.
      record: Whether to keep the routing.
      lookahead: How far to ask the next layers' gates, where the routing is kept.
      first_request: Number by which the first prompt draws.

    Raises:
      UsageError: A prompt is empty, too long or holds what is no token, or another argument is
        out of range.
    """
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} requests is empty", "Use 1 or more.")
    arrays, settings = check_generation(
        engine.config,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        record=record,
        lookahead=lookahead,
    )
    settings = settings._replace(batch_size=batch_size, num_tokens=1)
    draw = None if sampling.is_greedy else make_draw(sampling, seed, first_request, batch_size)
    return Service(
        engine,
        arrays,
        settings,
        draw,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        first_request=first_request,
        # As in `Engine.generate`: a token is read when the next steps are under way.
        num_ahead=1 if jax.default_backend() == "cpu" else 2,
    )


def _send(
    owners: Sequence[int | None],
    token_ids: Array,
    routed: Routed | None,
    logits: Array | None = None,
) -> _Unread:
    """Sets what the host will read on its way there."""
    for array in jax.tree.leaves((token_ids, routed, logits)):
        array.copy_to_host_async()
    return _Unread(tuple(owners), token_ids, routed, logits)


@partial(jax.jit, donate_argnums=0)
def _put(
    kv: KVCache, place: Place, number: Int32[Array, ""], one_kv: KVCache, one_place: Place
) -> tuple[KVCache, Place]:
    """The batch with one request in place `number`; nothing is left of who was there."""

    def put(batch: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(batch, one, number, axis=0)

    return jax.tree.map(put, (kv, place), (one_kv, one_place))
