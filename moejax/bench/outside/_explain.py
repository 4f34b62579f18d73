"""Explanations of what decode predictions miss, each from a measurement that is no decode speed."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from moejax.cards import Constant, Hardware

from ._decode import Adjust, DecodeSummary, predict_decode, summarise_decode
from ._published import PublishedStep

_MOETIER = "github.com/0xSero/moetier"
# registry/engine/exllamav3-cuda.json @a10d0b80: an expert of 9,474,048 bytes in 23 us.
_QUANTISED_BYTES_PER_S = 9_474_048 / 23e-6
# docs/latency-glm53-c1.md @b6a4da86: GPU work before the experts of a KDA and of a DSA layer of
# GLM-5.3-Flash on an RTX 3090, p50; 34 and 11 of 45 layers.
_MOETIER_LAYER_S = (34 * 237e-6 + 11 * 310e-6) / 45
_GLM = "glm-5.3-flash"


class Explanation(NamedTuple):
    """What might be missing, where that was measured, and the hardware that has it."""

    name: str
    what: str
    source: str
    adjust: Adjust


def explain_decode(
    steps: Sequence[PublishedStep],
) -> list[tuple[Explanation, list[DecodeSummary]]]:
    """The summaries of all sources under each explanation.

    Raises:
      BadFileError: A profile lacks a constant.
    """
    return [
        (explanation, summarise_decode(steps, predict_decode(steps, explanation.adjust)))
        for explanation in EXPLANATIONS
    ]


def _slow_kernels(hardware: Hardware, step: PublishedStep) -> Hardware:
    del step
    ratio = _QUANTISED_BYTES_PER_S / hardware.value("vram_bytes_per_s")
    return _with(hardware, "kernel_efficiency_ratio", ratio)


def _hand_off_once(hardware: Hardware, step: PublishedStep) -> Hardware:
    """The hand-off charged to a layer that misses at all, not to each of its misses."""
    assert step.stored is not None
    assert step.hit_ratio is not None
    topk = step.stored.spec.num_experts_per_tok
    num_misses = topk if step.misses == "host layers" else topk * (1 - step.hit_ratio)
    misses_any = 1.0 if step.misses == "host layers" else 1 - step.hit_ratio**topk
    once_s = hardware.value("host_expert_fixed_s") * misses_any / num_misses
    return _with(hardware, "host_expert_fixed_s", once_s)


def _longer_layers(hardware: Hardware, step: PublishedStep) -> Hardware:
    """Layers of GLM-5.3-Flash as another engine measured them, in place of the bytes they read."""
    assert step.stored is not None
    spec = step.stored.spec
    if spec.name != _GLM:
        return hardware
    rate = hardware.value("vram_bytes_per_s") * hardware.value("kernel_efficiency_ratio")
    more_s = max(0.0, _MOETIER_LAYER_S - spec.attention_bytes / rate)
    return _with(hardware, "layer_fixed_s", hardware.value("layer_fixed_s") + more_s)


def _all(*adjusts: Adjust) -> Adjust:
    def adjust(hardware: Hardware, step: PublishedStep) -> Hardware:
        for one in adjusts:
            hardware = one(hardware, step)
        return hardware

    return adjust


def _with(hardware: Hardware, name: str, value: float) -> Hardware:
    old = hardware.constants[name]
    constant = Constant(value, old.unit, "derived", None, _MOETIER)
    return dataclasses.replace(hardware, constants={**hardware.constants, name: constant})


_KERNELS = Explanation(
    "quantised kernels",
    "weights stream at 412 GB/s, as a 3-bit expert kernel does, not at 676",
    f"{_MOETIER} registry/engine/exllamav3-cuda.json @a10d0b80",
    _slow_kernels,
)
_HAND_OFF = Explanation(
    "hand-off once a layer",
    "the 145 us of hand-off and launch are charged to a layer that misses, not to each miss",
    f"{_MOETIER} registry/engine/avx2-exl3-cpu.json @a10d0b80",
    _hand_off_once,
)
_LAYERS = Explanation(
    "longer layers",
    "a layer's work before its experts takes the 255 us that another engine measured",
    f"{_MOETIER} docs/latency-glm53-c1.md @b6a4da86",
    _longer_layers,
)
EXPLANATIONS = (
    _KERNELS,
    _HAND_OFF,
    _LAYERS,
    Explanation(
        "hand-off once and quantised kernels",
        "the first two together",
        f"{_KERNELS.source}; {_HAND_OFF.source}",
        _all(_slow_kernels, _hand_off_once),
    ),
    Explanation(
        "hand-off once and longer layers",
        "the last two together",
        f"{_HAND_OFF.source}; {_LAYERS.source}",
        _all(_hand_off_once, _longer_layers),
    ),
)
"""What was tried, in the order of the report."""
