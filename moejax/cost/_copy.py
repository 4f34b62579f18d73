"""How long bytes take to move, for every place where an expert can wait.

On the link a copy of n bytes takes

    pinned    t = latency + n / bandwidth
    pageable  t = pageable latency + n / pageable bandwidth
    nvme      t = read(n) + n / host copy bandwidth + pinned(n)

in the time domain of CUDA events: what the copy occupies the link for. A host that submits a copy
and waits for its end sees a few microseconds more (about 6 on the rig of the RTX 3090 profile, so
10 to 13 at 4 KiB); copies that a device program issues do not. The sum of latency and n/bandwidth
was tested against the softer (latency^q + (n/bandwidth)^q)^(1/q) on that rig: the fitted q is 1.00,
so the knee of the curve needs no parameter of its own.
"""

import jax.numpy as jnp

from moejax._types import Scalar
from moejax.errors import UsageError

from ._parameters import CostParameters


def copy_s(
    parameters: CostParameters,
    num_bytes: Scalar,
    memory: str = "pinned",
    *,
    is_host_loaded: bool = False,
) -> Scalar:
    """Time until `num_bytes` that wait in `memory` are in device memory.

    Args:
      parameters: Constants of the machine.
      num_bytes: Size of one copy.
      memory: `pinned`, `pageable` or `nvme`.
      is_host_loaded: Whether the CPU streams experts at the same time; host memory then yields
        only `contention_ratio` of the pinned bandwidth.

    Raises:
      UsageError: `memory` is no such place.
    """
    share = parameters.contention_ratio if is_host_loaded else 1.0
    pinned_s = parameters.copy_latency_s + num_bytes / (parameters.pinned_h2d_bytes_per_s * share)
    if memory == "pinned":
        return pinned_s
    if memory == "pageable":
        rate = parameters.pageable_h2d_bytes_per_s * share
        return parameters.pageable_latency_s + num_bytes / rate
    if memory == "nvme":
        read_s = nvme_read_s(parameters, num_bytes)
        return read_s + host_copy_s(parameters, num_bytes) + pinned_s
    raise UsageError(f"{memory!r} is no memory to copy from", "Use pinned, pageable or nvme.")


def host_copy_s(parameters: CostParameters, num_bytes: Scalar) -> Scalar:
    """Time of a memcpy from pageable to pinned host memory by one thread."""
    return num_bytes / parameters.host_copy_bytes_per_s


def nvme_read_s(parameters: CostParameters, num_bytes: Scalar, queue_depth: Scalar = 1.0) -> Scalar:
    """Time per read of `num_bytes` when `queue_depth` reads are always under way.

    Little's law: a queue of q hides all but 1/q of each read, until the drive itself is the limit,

        t = max(n / bandwidth, (latency + n / bandwidth) / q).
    """
    stream_s = num_bytes / parameters.nvme_bytes_per_s
    return jnp.maximum(stream_s, (parameters.nvme_latency_s + stream_s) / queue_depth)


def host_expert_s(parameters: CostParameters, num_bytes: Scalar) -> Scalar:
    """Time of one expert of `num_bytes` computed on the CPU instead of copied.

    Few tokens leave the CPU bound by reading the weights, so FLOPs do not enter.
    """
    return parameters.host_expert_fixed_s + num_bytes / parameters.host_read_bytes_per_s
