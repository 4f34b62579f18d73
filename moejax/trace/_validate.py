"""Whether a trace is consistent with itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt

from moejax.errors import BadFileError

from ._trace import Trace, not_computed

# Tokens are checked in blocks so that a memory-mapped trace is never wholly in memory.
_BLOCK_IDS = 2**22


def validate_trace(trace: Trace) -> None:
    """Checks every invariant that the rest of moejax relies on.

    Shapes need no check: a trace whose shapes disagree cannot be made.

    Raises:
      BadFileError: An invariant does not hold; the message names it and the offending value.
    """
    _check_requests(trace)
    _check_experts(trace)
    if trace.phase is not None and np.any(trace.phase > 1):
        raise BadFileError(f"phase {int(trace.phase.max())} is neither 0 nor 1")
    if trace.expert_bytes is not None and np.any(trace.expert_bytes <= 0):
        raise BadFileError(f"expert_bytes {int(trace.expert_bytes.min())} is not positive")
    if trace.routing_weights is not None:
        for block in _blocks(trace.routing_weights):
            if not np.all(np.isfinite(block)):
                raise BadFileError("routing_weights hold a number that is not finite")
    if trace.lookahead is not None:
        for block in _blocks(trace.lookahead):
            _check_range(block, trace.num_experts, "lookahead")


@contextmanager
def naming(path: Path, hint: str) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it, and a cure where none is given."""
    try:
        yield
    except BadFileError as error:
        raise BadFileError(f"{path}: {error.cause}", error.hint or hint) from error


def _check_requests(trace: Trace) -> None:
    start = trace.request_start
    if start[0] != 0 or start[-1] != trace.num_tokens or np.any(start[1:] < start[:-1]):
        raise BadFileError(f"request_start does not rise from 0 to {trace.num_tokens} tokens")


def _check_experts(trace: Trace) -> None:
    for block in _blocks(trace.experts):
        _check_range(block, trace.num_experts, "experts")
        for first in range(trace.topk):
            for second in range(first + 1, trace.topk):
                twice = (block[..., first] == block[..., second]) & (
                    block[..., first] < trace.num_experts
                )
                if twice.any():
                    raise BadFileError(
                        f"expert {block[..., first][twice][0]} appears twice in one token and layer"
                    )


def _check_range(block: UInt[np.ndarray, "..."], num_experts: int, name: str) -> None:
    wrong = block[(block >= num_experts) & (block != not_computed(block))]
    if wrong.size:
        raise BadFileError(f"{name} hold {wrong[0]}, but there are {num_experts} experts")


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_IDS // max(1, array[:1].size))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]
