"""A model made ready to generate: its weights as plain arrays and its programs, compiled once."""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from moejax.qwen_moe import KVCache, Lookahead, QwenMoe, QwenMoeConfig, empty_cache

from ._check import check_generation
from ._generate import Generation
from ._programs import (
    PREFILL_OPTIONS,
    Place,
    ProgramSettings,
    Routed,
    decode,
    fill_up,
    prefill,
)
from ._sampling import GREEDY, Draw, Sampling, abstract_draw, make_draw

# Routers, norms and biases are smaller in every model; what trains a model changes all of them.
_MAX_DIGEST_BYTES = 2**20


class DecodeState(NamedTuple):
    """What a step changes where everything is resident."""

    kv: KVCache
    place: Place


class Engine:
    """Generates with every weight on the device.

    The model is split once and for all: what crosses the jit boundary is a list of arrays, which
    costs 0.15 ms a step for 24 layers, where `nnx.jit` would walk the modules for 20 ms.
    Programs are compiled before the first token is waited for and kept: one pair for each number
    of requests, length of prompts (to a power of two) and length of texts.

    Args:
      model: The model; its arrays are used as they are, not copied.
      experts: How the routed experts are computed, see `moejax.qwen_moe.EXPERTS`.

    Attributes:
      config: Sizes and settings of the model.
      num_compiles: How often each program was traced and compiled.
    """

    def __init__(self, model: QwenMoe, *, experts: str = "auto"):
        self.config: QwenMoeConfig = model.config
        self.num_compiles = {"prefill": 0, "decode": 0}
        self._experts = experts
        self._graph, state = nnx.split(model)
        params, self._tree = jax.tree.flatten(state)
        self._params = [jnp.asarray(param) for param in params]
        self._dtype = model.embed_tokens.weight[...].dtype
        self._programs: dict[tuple[str, ProgramSettings], Callable[..., Any]] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_token_ids: Collection[int] = (),
        record: bool = False,
        lookahead: Lookahead | None = None,
        first_request: int = 0,
    ) -> Generation:
        """Prepares one batch; the work is done as the result is iterated over.

        Args:
          prompts: Token ids of each request, of any lengths.
          max_new_tokens: Tokens after which a text ends.
          sampling: How the next token is chosen.
          seed: Seed of all draws; request i of the file and step j draw the same in every batch.
          stop_token_ids: Tokens that end a text.
          record: Whether to keep the routing.
          lookahead: How far to ask the next layers' gates, where the routing is kept.
          first_request: Number of the first prompt, in a file that is served batch by batch.

        Raises:
          UsageError: A prompt is empty, too long or holds what is no token, or another argument
            is out of range.
        """
        arrays, settings = check_generation(
            self.config,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            record=record,
            lookahead=lookahead,
        )
        token_ids, num_tokens = fill_up(arrays, settings.num_tokens)
        draw = None if sampling.is_greedy else make_draw(sampling, seed, first_request, len(arrays))

        start_s = time.perf_counter()
        num_before = sum(self.num_compiles.values())
        read = self._prefill_program(settings)
        step = self._decode_program(settings) if max_new_tokens > 1 else None
        is_fresh = sum(self.num_compiles.values()) > num_before
        compile_s = time.perf_counter() - start_s if is_fresh else 0.0

        def advance(cache: KVCache, place: Place):
            assert step is not None
            return step(self._params, cache, place, draw)

        return Generation(
            arrays,
            prefill=partial(read, self._params, token_ids, num_tokens, draw),
            decode=advance,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            compile_s=compile_s,
            # A GPU cannot start a step before its launch is prepared; one more hides that too.
            num_ahead=1 if jax.default_backend() == "cpu" else 2,
        )

    def fingerprint(self) -> str:
        """Tells models apart: a digest of the settings and of every parameter up to 1 MiB."""
        digest = hashlib.sha256(repr((self.config, self._dtype)).encode())
        for param in self._params:
            if param.nbytes <= _MAX_DIGEST_BYTES:
                digest.update(np.asarray(param).tobytes())
        return digest.hexdigest()

    def new_state(self, batch_size: int, num_positions: int) -> DecodeState:
        """A batch of requests that have read nothing yet, with room for so many tokens each."""
        row = jnp.zeros(batch_size, jnp.int32)
        cache = empty_cache(self.config, batch_size, num_positions, self._dtype)
        return DecodeState(cache, Place(row, row, row))

    def read(
        self,
        settings: ProgramSettings,
        token_ids: Int32[np.ndarray, "batch tokens"],
        num_tokens: Int32[np.ndarray, " batch"],
        draw: Draw | None,
    ) -> tuple[KVCache, Place, Float[Array, "batch vocab"], Routed | None]:
        """Runs `prefill`, compiled when it is first needed."""
        return self._prefill_program(settings)(self._params, token_ids, num_tokens, draw)

    def advance(
        self, settings: ProgramSettings, state: DecodeState, draw: Draw | None
    ) -> tuple[DecodeState, Int32[Array, " batch"], Routed | None]:
        """Runs `decode`, compiled when it is first needed; the keys and values are used up."""
        kv, place, routed = self._decode_program(settings)(self._params, *state, draw)
        return DecodeState(kv, place), place.token_ids, routed

    def _prefill_program(self, settings: ProgramSettings) -> Callable[..., Any]:
        rows = settings.batch_size
        token_ids = jax.ShapeDtypeStruct((rows, settings.num_tokens), jnp.int32)
        num_tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return self._program("prefill", prefill, settings, (token_ids, num_tokens))

    def _decode_program(self, settings: ProgramSettings) -> Callable[..., Any]:
        settings = settings._replace(num_tokens=1)
        rows = settings.batch_size

        state = jax.eval_shape(lambda: self.new_state(rows, settings.num_positions))
        return self._program("decode", decode, settings, state)

    def _program(
        self,
        name: str,
        function: Callable[..., Any],
        settings: ProgramSettings,
        arguments: tuple[Any, ...],
    ) -> Callable[..., Any]:
        """The program compiled for these settings, ahead of its first call.

        A warm call instead would read a whole prompt in vain, and need a cache of its own.
        """
        if (name, settings) not in self._programs:

            def program(params, *arguments):
                self.num_compiles[name] += 1
                model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, params))
                return function(model, settings, self._experts, *arguments)

            draw = None if settings.is_greedy else abstract_draw(settings.batch_size)
            donated = 1 if name == "decode" else ()
            jitted = jax.jit(program, donate_argnums=donated)
            lowered = jitted.lower(self._params, *arguments, draw)
            options = PREFILL_OPTIONS if name == "prefill" else None
            self._programs[name, settings] = lowered.compile(compiler_options=options)
        return self._programs[name, settings]
