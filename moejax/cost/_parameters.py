"""The numbers that the laws of this package read, as one pytree of floats."""

from typing import NamedTuple

from moejax._types import Scalar
from moejax.cards import Hardware


class CostParameters(NamedTuple):
    """Constants of one machine; every field is a pytree leaf, so costs differentiate in it.

    Attributes:
      vram_bytes_per_s: What a large device-to-device copy reaches, reads and writes counted.
      matmul_flops: bf16 FLOP/s of a large matrix product with float32 accumulation.
      kernel_efficiency_ratio: Share of `vram_bytes_per_s` at which a kernel streams weights.
      layer_fixed_s: Cost of one layer that no byte and no FLOP explains: launches, ramps, tails.
      step_fixed_s: The same, once per decode step.
      copy_latency_s: Time on the link that a pinned copy of no bytes would take.
      pinned_h2d_bytes_per_s: Slope of the copy law from pinned host memory.
      contention_ratio: Pinned bandwidth while the host reads experts too, over the idle one.
      pageable_latency_s: Latency of a copy from pageable memory.
      pageable_h2d_bytes_per_s: Sustained bandwidth from pageable memory.
      host_copy_bytes_per_s: Pageable to pinned memcpy, payload bytes.
      nvme_latency_s: One read at queue depth 1, without its bytes.
      nvme_bytes_per_s: Bandwidth of the drive with a full queue.
      host_read_bytes_per_s: Rate at which the CPU streams the weights of an expert it computes.
      host_expert_fixed_s: Hand-off and launch of one expert on the CPU.
      overlap_ratio: Share of the shorter of copy and compute that hides behind the longer.
      batched_layer_s: What a layer costs more for several requests than for one, beside bytes.
      prefetch_overlap_ratio: Share of a prefetch's copy that hides behind the layers beside it.
    """

    vram_bytes_per_s: Scalar
    matmul_flops: Scalar
    kernel_efficiency_ratio: Scalar
    layer_fixed_s: Scalar
    step_fixed_s: Scalar
    copy_latency_s: Scalar
    pinned_h2d_bytes_per_s: Scalar
    contention_ratio: Scalar
    pageable_latency_s: Scalar
    pageable_h2d_bytes_per_s: Scalar
    host_copy_bytes_per_s: Scalar
    nvme_latency_s: Scalar
    nvme_bytes_per_s: Scalar
    host_read_bytes_per_s: Scalar
    host_expert_fixed_s: Scalar
    overlap_ratio: Scalar
    batched_layer_s: Scalar = 0.0
    prefetch_overlap_ratio: Scalar = 1.0


def from_hardware(hardware: Hardware) -> CostParameters:
    """The constants of a hardware profile, without their units and sources.

    Raises:
      BadFileError: The profile lacks a constant that has no neutral value.
    """
    neutral = CostParameters._field_defaults
    return CostParameters(
        *(
            neutral[name]
            if name in neutral and name not in hardware.constants
            else hardware.value(name)
            for name in CostParameters._fields
        )
    )
