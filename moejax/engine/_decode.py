"""One decode step of an offloaded model as a function of arrays, by kernels or in plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moejax.devices import Team
from moejax.qwen_moe import QwenMoeConfig
from moejax.strategies import Strategy

from . import _offload_kernels, _offload_xla
from ._event import COUNTS, ReplayTable, Sizes
from ._expert_cache import OffloadState, booleans
from ._offload_xla import Decoded
from ._programs import Place, ProgramSettings, StepOutput, routed_of
from ._sampling import next_tokens
from .kernels._dense_weights import DenseWeights
from .kernels._route import Router


def make_step(
    config: QwenMoeConfig,
    kernels: str,
    graph: Any,
    strategy: Strategy,
    sizes: Sizes,
    settings: ProgramSettings,
) -> Callable[..., Decoded]:
    """A function `step(params, hosts, state, table)` that reads the newest tokens.

    Args:
      config: The model.
      kernels: `pallas`, `interpret` or `xla`.
      graph: For `xla`, what makes a model of the parameters.
      strategy: What decides which experts stay on the device.
      sizes: What programs are compiled for.
      settings: Of this program.
    """
    lookahead = settings.lookahead
    if kernels == "xla":

        def plain_step(params, hosts, state, table):
            model = nnx.merge(graph, params)
            return _offload_xla.decode_step(model, hosts, strategy, sizes, state, table, lookahead)

        return plain_step
    router = Router(
        strategy, sizes, booleans(strategy, sizes), settings.batch_size, config.norm_topk_prob
    )
    num_asked = sizes.shape.depth if sizes.asks_gates else 0
    num_ahead = max(num_asked, lookahead.depth if lookahead else 0)
    program = _offload_kernels.Program(
        config, router, num_ahead, is_interpreted=kernels == "interpret"
    )

    def step(params: DenseWeights, hosts, state, table):
        return _offload_kernels.decode_step(params, hosts, program, state, table, lookahead)

    return step


def program_specs(*, is_replayed: bool) -> tuple[Any, Any]:
    """How several devices share what `make_program` takes and gives; see `moejax.devices.Team`.

    Of counts, the layers of one device come behind those of another.
    """
    own: Any = Team.OWN
    alike: Any = Team.ALIKE
    counts: Any = PartitionSpec(None, Team.AXIS)
    table = ReplayTable(alike, own, own, own) if is_replayed else alike
    return (
        (alike, own, alike, alike, own, alike, table),
        (OffloadState(alike, alike, own), StepOutput(alike, alike, counts, alike)),
    )


def make_program(
    config: QwenMoeConfig,
    step: Callable[..., Decoded],
    settings: ProgramSettings,
    num_steps: int,
) -> Callable[..., tuple[OffloadState, StepOutput]]:
    """A function `program(params, hosts, kv, place, experts, draw, table)` that takes steps.

    Args:
      config: The model.
      step: What `make_step` gives.
      settings: Of this program.
      num_steps: Steps that one call takes.
    """

    def program(params, hosts, kv, place, experts, draw, table):
        def one(state: OffloadState) -> tuple[OffloadState, StepOutput]:
            decoded = step(params, hosts, state, table)
            number = state.place.step + 1
            token_ids = next_tokens(decoded.logits, number, draw)
            place = Place(token_ids, state.place.positions + 1, number)
            counts = decoded.experts.tables.counts[:, : len(COUNTS)]
            routed = routed_of(config, settings, decoded.routings)
            state = OffloadState(decoded.kv, place, decoded.experts)
            return state, StepOutput(token_ids[None], decoded.logits, counts[None], routed)

        state = OffloadState(kv, place, experts)
        if num_steps == 1:
            return one(state)

        def again(carry, _):
            state, output = one(carry[0])
            return (state, output.logits, output.routed), (output.token_ids[0], output.counts[0])

        _, output = jax.eval_shape(one, state)
        blank = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (output.logits, output.routed)
        )
        (state, logits, routed), (token_ids, counts) = jax.lax.scan(
            again, (state, *blank), None, length=num_steps
        )
        return state, StepOutput(token_ids, logits, counts, routed)

    return program
