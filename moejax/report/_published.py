"""Hit-rate curves that others published, for comparison with ours."""

from collections.abc import Mapping
from types import MappingProxyType

PUBLISHED_SOURCE = "arXiv:2505.16056, figure, digitised"
PUBLISHED_ADDRESS = "https://arxiv.org/abs/2505.16056"
PUBLISHED_ERROR_RATIO = 0.03
"""How well the points could be read off the figure."""

_QWEN15_MOE = MappingProxyType(
    {
        "oracle": MappingProxyType(
            {
                2: 0.27, 4: 0.39, 6: 0.47, 8: 0.53, 10: 0.58, 12: 0.63, 16: 0.70, 20: 0.76,
                24: 0.80, 30: 0.86, 36: 0.90, 45: 0.95, 52: 0.98, 56: 0.99,
            }
        ),
        "lru": MappingProxyType(
            {
                2: 0.10, 4: 0.19, 6: 0.24, 8: 0.28, 10: 0.32, 12: 0.36, 16: 0.43, 20: 0.50,
                24: 0.57, 30: 0.65, 36: 0.74, 45: 0.86, 52: 0.93, 56: 0.96,
            }
        ),
        "lfu": MappingProxyType({4: 0.14, 8: 0.24, 16: 0.40, 30: 0.65, 45: 0.86}),
    }
)  # fmt: skip


def published_points(model_name: str) -> Mapping[str, Mapping[int, float]]:
    """Warm hit ratio by strategy and slots per layer; empty for a model without published curves.

    Reference:
      arXiv:2505.16056: per-layer caches, 512-token samples, one request at a time.
    """
    return _QWEN15_MOE if model_name.startswith("qwen1.5-moe") else MappingProxyType({})
