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
from jaxtyping import Array, Float, Int32, Shaped

from moejax.devices import ONE_DEVICE, Team
from moejax.offload import unpack
from moejax.qwen_moe import KVCache, Lookahead, QwenMoe, Routing
from moejax.qwen_moe import experts as compute_experts
from moejax.strategies import NEVER

from ._dense_model import DenseModel, Outline, Params, take_apart
from ._programs import (
    PREFILL_OPTIONS,
    Place,
    ProgramSettings,
    Routed,
    finish_prefill,
    prompt_positions,
)
from ._sampling import Draw, abstract_draw
from ._share import number_on, total

OnLayer: TypeAlias = Callable[[int, Array, Routing], Any]
"""Called as `on_layer(moe_layer, packed, routing)` when a layer's computation is under way.

`packed` are the layer's experts on the device. What the call returns is waited for before their
memory is needed again, and before the next call, which may donate it.
"""


# Weights, gates and their number, the packed experts, the residual stream.
_LAYER = (Team.ALIKE, Team.ALIKE, Team.ALIKE, Team.OWN, Team.ALIKE)


class StreamedPrefill:
    """Reads whole prompts like `prefill`, with the experts of two layers on the device at most.

    All layers with experts share one compiled program, and all others a second one.

    Args:
      model: The model; its own routed experts are not looked at and may be empty. Of stacked
        weights, each layer's are copied out while it computes.
      layers: Packed experts of every layer that has some, see `ExpertLayout`. They stay where
        they are; copies go to the device.
      team: The devices that share them; see `ExpertStore`.
      experts: How the routed experts are computed, see `moejax.qwen_moe.EXPERTS`.

    Attributes:
      num_compiles: How often each kind of program was traced and compiled.
    """

    def __init__(
        self,
        model: QwenMoe | DenseModel,
        layers: Sequence[Shaped[Array, "experts ffn3 hidden"]],
        *,
        team: Team = ONE_DEVICE,
        experts: str = "auto",
    ):
        self.num_compiles = {"embed": 0, "layer": 0, "head": 0}
        self._moe_layers = model.config.moe_layers
        self._experts, self._team = experts, team
        self._packed = dict(zip(self._moe_layers, layers, strict=True))
        self._parts = take_apart(model)
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
        x = embed.call(self._parts.outer_params, token_ids)
        outputs, users = [], []
        for number, program in enumerate(layers):
            packed = None
            if number in self._packed:
                if users:
                    # The layer before makes room for the next. That one is sent before this one
                    # is computed, since a copy waits for what the device was told to do earlier.
                    jax.block_until_ready(users)
                    on_device.extend(_send(layer) for layer in islice(waiting, 1))
                packed = on_device.popleft()
            x, *output = program.call(*self._weights(number, settings.lookahead), packed, x)
            outputs.append(output)
            if packed is not None:
                users = [x]
                if on_layer is not None:
                    users.append(on_layer(self._moe_layers.index(number), packed, output[-1]))
        return head.call(self._parts.outer_params, x, *_collect(outputs), num_tokens, draw)

    def _programs(self, settings: ProgramSettings) -> "_Programs":
        rows, lookahead = settings.batch_size, settings.lookahead
        shape = (rows, settings.num_tokens)
        whole, params = self._parts.outer, self._parts.outer_params

        def embed(params, token_ids):
            return whole.merge(params).embed_tokens(token_ids)

        token_ids = self._alike(jax.ShapeDtypeStruct(shape, jnp.int32))
        first = self._compile("embed", shape, embed, params, token_ids)
        layers = []
        for number, layer in enumerate(self._parts.layers):
            packed = self._packed.get(number)
            if packed is not None:
                packed = self._team.shapes(packed, Team.OWN)
            run = partial(_run_layer, layer.outline, self._experts, lookahead, self._team)
            gates = [layer.gate_shapes] * len(self._following(number, lookahead)[0])
            weights = (layer.shapes, gates, jax.ShapeDtypeStruct((), jnp.int32))
            weights = self._alike(weights)
            key = (layer.outline.graph, shape, lookahead)
            layers.append(
                self._compile("layer", key, run, *weights, packed, first.output, specs=_LAYER)
            )

        def head(params, x, cache, routings, num_tokens, draw):
            model = whole.merge(params)
            hidden = model.norm(x)
            return finish_prefill(model, settings, hidden, cache, routings, num_tokens, draw)

        said = _collect([layer.output[1:] for layer in layers])
        num_tokens = self._alike(jax.ShapeDtypeStruct((rows,), jnp.int32))
        draw = None if settings.is_greedy else self._alike(abstract_draw(rows))
        last = self._compile("head", settings, head, params, first.output, *said, num_tokens, draw)
        return _Programs(first, layers, last)

    def _compile(
        self,
        name: str,
        key: Any,
        function: Callable[..., Any],
        *arguments: Any,
        specs: Any = Team.ALIKE,
    ) -> "_Program":
        if (name, key) not in self._compiled:

            def program(*arguments):
                self.num_compiles[name] += 1
                return function(*arguments)

            lowered = jax.jit(self._team.run(program, specs, Team.ALIKE)).lower(*arguments)
            self._compiled[name, key] = _Program(
                lowered.compile(compiler_options=PREFILL_OPTIONS), self._alike(lowered.out_info)
            )
        return self._compiled[name, key]

    def _alike(self, tree: Any) -> Any:
        return self._team.shapes(tree, Team.ALIKE)

    def _weights(
        self, number: int, lookahead: Lookahead | None
    ) -> tuple[Params, list[Params], np.int32]:
        """The parameters of one layer, the gates it asks, and how many of these there are."""
        layers, (asked, num_asked) = self._parts.layers, self._following(number, lookahead)
        return layers[number].take(), [layers[n].take_gate() for n in asked], np.int32(num_asked)

    def _following(self, number: int, lookahead: Lookahead | None) -> tuple[list[int], int]:
        """The layers whose gates one asks, and how many of these there are.

        Where fewer follow, the layer's own stands in, so that one program fits all.
        """
        depth = 0 if lookahead is None or number not in self._packed else lookahead.depth
        following = [layer for layer in self._moe_layers if layer > number][:depth]
        return following + [number] * (depth - len(following)), len(following)


class _Program(NamedTuple):
    """A compiled function, and the shapes of what it returns."""

    call: Callable[..., Any]
    output: Any


class _Programs(NamedTuple):
    """What comes before the layers, every layer, and what comes behind them."""

    embed: _Program
    layers: list[_Program]
    head: _Program


def _run_layer(
    layer: Outline,
    experts: str,
    lookahead: Lookahead | None,
    team: Team,
    params: Params,
    gates: list[Params],
    num_gates: Array,
    packed: Array | None,
    x: Array,
) -> tuple[Array, tuple[Array, Array], Routing | None]:
    """One layer of `QwenMoe.hidden_states`."""
    module = layer.merge(params)
    stream, cached = module.attend(x, prompt_positions(*x.shape[:2]))

    def compute(x, selected_experts, routing_weights, *_):
        if team.num_devices == 1:
            return compute_experts(
                x, selected_experts, routing_weights, *unpack(packed), implementation=experts
            )
        own = number_on(selected_experts, jax.lax.axis_index(Team.AXIS), team.num_devices)
        weights = jnp.where(own < NEVER, routing_weights, 0.0)
        answer = compute_experts(
            x, own, weights, *unpack(packed), implementation=experts, dtype=jnp.float32
        )
        return total(answer, team.num_devices)

    x, routing = module.feed_forward(stream, implementation=compute)
    if routing is not None and lookahead is not None:
        said = [layer.merge(gate).foresee(stream, lookahead.width) for gate in gates]
        said = jnp.stack(said, axis=1)
        is_there = jnp.arange(lookahead.depth) < num_gates
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
