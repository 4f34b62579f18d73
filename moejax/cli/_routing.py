"""Where a command's routing comes from: a recorded trace, or a draw of a workload."""

from dataclasses import replace
from typing import TYPE_CHECKING

from moejax.errors import UsageError

from ._options import DEFAULT_MODEL
from ._progress import say

if TYPE_CHECKING:
    from moejax.cards import ModelSpec
    from moejax.trace import Trace

_NUM_REQUESTS, _TOKENS_PER_REQUEST = 8, 256


def recorded_trace(
    name_or_path: str | None, workload: str | None, model: str | None
) -> "Trace | None":
    """The trace of --trace; None where it was not given.

    A trace may carry the sizes of its model's experts. They do not count where --model names
    another one: then the routing is recorded, and the sizes are that model's.

    Raises:
      BadFileError: The trace cannot be read.
      UsageError: A workload was named as well.
    """
    from moejax.trace import load_trace

    if name_or_path is None:
        return None
    if workload is not None:
        raise UsageError("--trace and --workload exclude each other", "Give one of them.")
    trace = load_trace(name_or_path)
    if model and trace.expert_bytes is not None and model != trace.model:
        say(f"experts have the sizes of {model}, not those recorded of {trace.model or 'a model'}")
        return replace(trace, expert_bytes=None)
    return trace


def open_routing(workload: str, seed: int, batch_size: int = 1) -> "Trace":
    """A draw of a workload, for commands that need one trace.

    No place of a batch stays empty, not even where half of the requests become a profile.

    Raises:
      UsageError: The workload is not known.
    """
    from moejax.workloads import WORKLOADS, make_trace

    return make_trace(
        WORKLOADS[check_workload(workload)],
        num_requests=batch_size * max(2, -(-_NUM_REQUESTS // batch_size)),
        tokens_per_request=_TOKENS_PER_REQUEST,
        seed=seed,
    )


def check_batch(trace: "Trace", batch_size: int) -> None:
    """Refuses a batch with places that no request of the trace would ever take.

    Raises:
      UsageError: There are fewer requests than places.
    """
    if trace.num_requests < batch_size:
        raise UsageError(
            f"the trace has {trace.num_requests} request(s), too few for a batch of {batch_size}",
            f"Use --batch-size {trace.num_requests} or less, or record more requests.",
        )


def check_workload(name: str) -> str:
    """The name, if a workload has it.

    Raises:
      UsageError: None has.
    """
    from moejax.workloads import WORKLOADS

    if name not in WORKLOADS:
        raise UsageError(f"--workload: {name!r} is not known", f"Known: {', '.join(WORKLOADS)}.")
    return name


def check_lookahead(names: tuple[str, ...], trace: "Trace | None") -> None:
    """Refuses strategies that ask the next gates where a trace has not recorded them.

    Raises:
      UsageError: A strategy needs `lookahead` and the trace has none.
    """
    from moejax.strategies import STRATEGIES

    readers = [name for name in names if STRATEGIES[name].needs_lookahead]
    if readers and trace is not None and trace.lookahead is None:
        raise UsageError(
            f"{readers[0]} needs a trace with `lookahead` and this one has none",
            "Record one that has, or leave the strategy out.",
        )


def model_name(model: str | None, trace: "Trace | None", workload: str | None) -> str:
    """The model that was named, else the trace's or the workload's own, else the default."""
    from moejax.workloads import WORKLOADS

    if model:
        return model
    if trace is not None:
        return trace.model or DEFAULT_MODEL
    return WORKLOADS[workload].model if workload and workload in WORKLOADS else DEFAULT_MODEL


def workload_of(spec: "ModelSpec") -> str:
    """The first workload that routes like this model; the default where there is none."""
    from moejax.workloads import WORKLOADS, default_workload

    own = [name for name, workload in WORKLOADS.items() if workload.model == spec.name]
    return own[0] if own else default_workload
