"""Reading prompts with the routed experts in host memory: they come layer by layer.

While one layer computes, the next one's experts are on their way, so that a long prompt takes
about as long as the slower of the two, and the experts of no more than two layers are on the
device. The arithmetic is that of the resident `prefill`, cut into one program a layer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Shaped

from moejax.offload import unpack
from moejax.qwen_moe import KVCache, Lookahead, QwenMoe, Routing
from moejax.qwen_moe import experts as compute_experts

from ._programs import (
    PREFILL_OPTIONS,
    Place,
    ProgramSettings,
    Routed,
    finish_prefill,
    prompt_positions,
)
from ._sampling import Draw, abstract_draw

OnLayer: TypeAlias = Callable[[int, Array, Routing], Any]
"""Called as `on_layer(moe_layer, packed, routing)` when a layer's computation is under way.

`packed` are the layer's experts on the device. What the call returns is waited for before their
memory is needed again, and before the next call, which may donate it.
"""


class StreamedPrefill:
    """Reads whole prompts like `prefill`, with the experts of two layers on the device at most.

    All layers with experts share one compiled program, and all others a second one.

    Args:
      model: The model; its own routed experts are not looked at and may be empty.
      layers: Packed experts of every layer that has some, see `ExpertLayout`. They stay where
        they are; copies go to the device.
      experts: How the routed experts are computed, see `moejax.qwen_moe.EXPERTS`.

    Attributes:
      num_compiles: How often each kind of program was traced and compiled.
    """

    def __init__(
        self,
        model: QwenMoe,
        layers: Sequence[Shaped[Array, "experts ffn3 hidden"]],
        *,
        experts: str = "auto",
    ):
        self.num_compiles = {"embed": 0, "layer": 0, "head": 0}
        self._moe_layers = model.config.moe_layers
        self._experts = experts
        self._packed = dict(zip(self._moe_layers, layers, strict=True))
        self._model = _split(model)
        self._layers = [_split(layer) for layer in model.layers]
        self._compiled: dict[tuple[str, Any], _Program] = {}
        self._ready: dict[ProgramSettings, _Programs] = {}

    def prepare(self, settings: ProgramSettings) -> None:
        """Compiles what prompts of these settings need and is not there yet."""
        if settings not in self._ready:
            self._ready[settings] = self._programs(settings)

    def __call__(
        self,
        settings: ProgramSettings,
        token_ids: Int32[np.ndarray, "batch tokens"],
        num_tokens: Int32[np.ndarray, " batch"],
        draw: Draw | None,
        *,
        on_layer: OnLayer | None = None,
    ) -> tuple[KVCache, Place, Float[Array, "batch vocab"], Routed | None]:
        """Reads prompts and chooses the first token after each, like `prefill`.

        Args:
          settings: Shapes, and what is returned.
          token_ids: Prompts, filled up on the right.
          num_tokens: Length of each, at least 1.
          draw: How to draw the tokens; None takes the best.
          on_layer: Shown the experts of each layer while they are on the device.

        Returns:
          The cache, where the requests stand, the logits behind each prompt, and the routing.
        """
        self.prepare(settings)
        embed, layers, head = self._ready[settings]
        waiting = iter(self._packed.values())
        on_device = deque(_send(packed) for packed in islice(waiting, 2))
        x = embed.call(self._model.params, token_ids)
        outputs, users = [], []
        for number, program in enumerate(layers):
            packed = on_device.popleft() if number in self._packed else None
            x, *output = program.call(*self._weights(number, settings.lookahead), packed, x)
            outputs.append(output)
            if packed is None:
                continue
            if users:
                # This layer is under way: the device stays busy while the host waits for the
                # one before, whose experts make room for the next.
                jax.block_until_ready(users)
                on_device.extend(_send(layer) for layer in islice(waiting, 1))
            users = [x]
            if on_layer is not None:
                users.append(on_layer(self._moe_layers.index(number), packed, output[-1]))
        return head.call(self._model.params, x, *_collect(outputs), num_tokens, draw)

    def _programs(self, settings: ProgramSettings) -> "_Programs":
        rows, lookahead = settings.batch_size, settings.lookahead
        shape = (rows, settings.num_tokens)
        whole = self._model

        def embed(params, token_ids):
            return whole.merge(params).embed_tokens(token_ids)

        token_ids = jax.ShapeDtypeStruct(shape, jnp.int32)
        first = self._compile("embed", shape, embed, whole.params, token_ids)
        layers = []
        for number, layer in enumerate(self._layers):
            packed = self._packed.get(number)
            if packed is not None:
                packed = jax.ShapeDtypeStruct(packed.shape, packed.dtype)
            run = partial(_run_layer, layer, self._experts, lookahead)
            weights = self._weights(number, lookahead)
            key = (layer.graph, shape, lookahead)
            layers.append(self._compile("layer", key, run, *weights, packed, first.output))

        def head(params, x, cache, routings, num_tokens, draw):
            model = whole.merge(params)
            hidden = model.norm(x)
            return finish_prefill(model, settings, hidden, cache, routings, num_tokens, draw)

        said = _collect([layer.output[1:] for layer in layers])
        num_tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
        draw = None if settings.is_greedy else abstract_draw(rows)
        last = self._compile(
            "head", settings, head, whole.params, first.output, *said, num_tokens, draw
        )
        return _Programs(first, layers, last)

    def _compile(
        self, name: str, key: Any, function: Callable[..., Any], *arguments: Any
    ) -> "_Program":
        if (name, key) not in self._compiled:

            def program(*arguments):
                self.num_compiles[name] += 1
                return function(*arguments)

            lowered = jax.jit(program).lower(*arguments)
            self._compiled[name, key] = _Program(
                lowered.compile(compiler_options=PREFILL_OPTIONS), lowered.out_info
            )
        return self._compiled[name, key]

    def _weights(
        self, number: int, lookahead: Lookahead | None
    ) -> tuple[list[Array], list[list[Array]], np.int32]:
        """The parameters of one layer, of the layers whose gates it asks, and how many these are.

        Where fewer follow, the layer's own stand in, so that one program fits all.
        """
        own = self._layers[number].params
        depth = 0 if lookahead is None or number not in self._packed else lookahead.depth
        following = [layer for layer in self._moe_layers if layer > number][:depth]
        ahead = [self._layers[layer].params for layer in following]
        ahead += [own] * (depth - len(ahead))
        return own, ahead, np.int32(len(following))


class _Split(NamedTuple):
    """A module as plain arrays and what puts them together again."""

    graph: Any
    tree: Any
    params: list[Array]

    def merge(self, params: list[Array]) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))


class _Program(NamedTuple):
    """A compiled function, and the shapes of what it returns."""

    call: Callable[..., Any]
    output: Any


class _Programs(NamedTuple):
    """What comes before the layers, every layer, and what comes behind them."""

    embed: _Program
    layers: list[_Program]
    head: _Program


def _split(module: nnx.Module) -> _Split:
    graph, state = nnx.split(module)
    params, tree = jax.tree.flatten(state)
    return _Split(graph, tree, params)


def _run_layer(
    layer: _Split,
    experts: str,
    lookahead: Lookahead | None,
    params: list[Array],
    ahead: list[list[Array]],
    num_ahead: Array,
    packed: Array | None,
    x: Array,
) -> tuple[Array, tuple[Array, Array], Routing | None]:
    """One layer of `QwenMoe.hidden_states`."""
    module = layer.merge(params)
    stream, cached = module.attend(x, prompt_positions(*x.shape[:2]))

    def compute(x, selected_experts, routing_weights, *_):
        return compute_experts(
            x, selected_experts, routing_weights, *unpack(packed), implementation=experts
        )

    x, routing = module.feed_forward(stream, implementation=compute)
    if routing is not None and lookahead is not None:
        said = jnp.stack([layer.merge(a).foresee(stream, lookahead.width) for a in ahead], axis=1)
        is_there = jnp.arange(lookahead.depth) < num_ahead
        routing = routing._replace(lookahead=jnp.where(is_there[None, :, None], said, -1))
    return x, cached, routing


def _send(packed: Array) -> Array:
    """Sets a layer's experts on their way to the device; nobody waits."""
    return jax.device_put(packed, packed.sharding.with_memory_kind("device"))


def _collect(outputs: Sequence[Any]) -> tuple[KVCache, tuple[Routing, ...]]:
    """Keys, values and routing of all layers, as `QwenMoe.hidden_states` returns them."""
    cached = [pair for pair, _ in outputs]
    routings = tuple(routing for _, routing in outputs if routing is not None)
    keys, values = zip(*cached, strict=True)
    return KVCache(keys, values), routings
