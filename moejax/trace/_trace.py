"""The trace itself: recorded or synthetic routing of many requests, token by token."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Int32, Int64, UInt, UInt8

from moejax.errors import BadFileError

MAX_EXPERTS = np.iinfo(np.uint16).max - 1
"""Sixteen bits hold this many expert numbers and one for "not computed"."""

_HASH_BLOCK_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class Trace:
    """Which experts each token was routed to, in every layer that has experts.

    Arrays may be memory-mapped and are never written to. The largest number of an unsigned type
    stands for "not computed" wherever expert numbers are stored.

    A trace whose shapes disagree cannot be made; `validate_trace` checks the contents.

    Attributes:
      experts: Experts of each token and layer; distinct inside one token and layer.
      num_experts: Experts of one layer; every number in `experts` is smaller.
      request_start: First token of each request, and the number of tokens at the end.
      phase: 0 for tokens of a prompt, 1 for generated ones; None where that is not known.
      routing_weights: The router's weights, in the order of `experts`.
      token_ids: What the tokens were, in the source's own numbering.
      lookahead: `lookahead[t, l, d - 1]` are the experts of layer `l + d` as its gate would
        predict them from the hidden state of layer `l`, best first.
      expert_bytes: Bytes of one expert of each layer.
      model: Name of the model that was recorded.
      source: Where the routing comes from.
      licence: Licence of the recording.
      sha256: Of `experts`, computed where it is not given.
      is_router_order: Experts of a token stand in the router's order, best first.
      workload: Name of the synthetic workload; None for recorded routing.
      warnings: What an importer had to assume, in sentences.

    Raises:
      BadFileError: Shapes disagree or something is empty.
    """

    experts: UInt[np.ndarray, "tokens layers topk"]
    num_experts: int
    request_start: Int64[np.ndarray, " requests_plus_1"]
    phase: UInt8[np.ndarray, " tokens"] | None = None
    routing_weights: Float16[np.ndarray, "tokens layers topk"] | None = None
    token_ids: Int32[np.ndarray, " tokens"] | None = None
    lookahead: UInt[np.ndarray, "tokens layers depth width"] | None = None
    expert_bytes: Int64[np.ndarray, " layers"] | None = None
    model: str = ""
    source: str = ""
    licence: str = ""
    sha256: str = ""
    is_router_order: bool = False
    workload: str | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_shapes(self)
        if not self.sha256:
            object.__setattr__(self, "sha256", hash_experts(self.experts))

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests."""
        return self.experts.shape[0]

    @property
    def num_layers(self) -> int:
        """Layers with routed experts."""
        return self.experts.shape[1]

    @property
    def topk(self) -> int:
        """Experts per token and layer."""
        return self.experts.shape[2]

    @property
    def num_requests(self) -> int:
        """Requests, in the order they were recorded."""
        return self.request_start.shape[0] - 1


def expert_dtype(num_experts: int) -> np.dtype:
    """The smallest type that holds every expert number and one for "not computed"."""
    return np.dtype(np.uint8 if num_experts <= np.iinfo(np.uint8).max else np.uint16)


def not_computed(experts: UInt[np.ndarray, "..."]) -> int:
    """The number that stands for "no expert" in an array of expert numbers."""
    return int(np.iinfo(experts.dtype).max)


def hash_experts(experts: UInt[np.ndarray, "..."]) -> str:
    """SHA-256 of the expert numbers, little-endian and in C order, as hexadecimal digits."""
    digest = hashlib.sha256()
    rows = max(1, _HASH_BLOCK_BYTES // max(1, experts[:1].nbytes))
    for start in range(0, experts.shape[0], rows):
        block = experts[start : start + rows]
        digest.update(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def _check_shapes(trace: Trace) -> None:
    if trace.experts.ndim != 3 or 0 in trace.experts.shape:
        raise BadFileError(
            f"experts have shape {list(trace.experts.shape)}",
            "At least one token, layer and expert are needed: [tokens, layers, topk].",
        )
    tokens, layers, topk = trace.experts.shape
    if not 1 <= trace.num_experts <= not_computed(trace.experts):
        raise BadFileError(f"{trace.num_experts} experts do not fit {trace.experts.dtype}")
    if topk > trace.num_experts:
        raise BadFileError(f"{topk} experts per token exceed {trace.num_experts}")
    if trace.request_start.ndim != 1 or trace.request_start.size < 2:
        raise BadFileError(f"request_start has shape {list(trace.request_start.shape)}")
    expected = {
        "phase": (tokens,),
        "routing_weights": (tokens, layers, topk),
        "token_ids": (tokens,),
        "expert_bytes": (layers,),
    }
    for name, shape in expected.items():
        array = getattr(trace, name)
        if array is not None and array.shape != shape:
            raise BadFileError(f"{name} has shape {list(array.shape)}, not {list(shape)}")
    if trace.lookahead is not None:
        shape = trace.lookahead.shape
        if len(shape) != 4 or shape[:2] != (tokens, layers) or 0 in shape:
            raise BadFileError(
                f"lookahead has shape {list(shape)}, not [{tokens}, {layers}, depth, width]"
            )
