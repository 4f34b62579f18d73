"""One decode step of an offloaded model as a function of arrays, by kernels or in plain JAX."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from moejax.qwen_moe import QwenMoeConfig
from moejax.strategies import Strategy

from . import _offload_kernels, _offload_xla
from ._event import Sizes
from ._expert_cache import booleans
from ._offload_xla import Decoded
from ._programs import ProgramSettings
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
