"""What a trace looks like: reuse, popularity and how far layers predict each other."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ._demand import known_ids
from ._trace import Trace

# Recall is a mean over tokens; more of them than this change its third digit at most.
_MAX_RECALL_TOKENS = 20_000
# The tables of pairs would outgrow memory beyond this.
_MAX_RECALL_EXPERTS = 1024
_BLOCK_IDS = 2**20


@dataclass(frozen=True)
class TraceStatistics:
    """Ratios are means over layers; None where a trace is too short or too flat to tell.

    Attributes:
      reuse_ratio: Share of a token's experts that the token before it, in the same request, used.
      reuse_chance_ratio: The same for routing at random: top-k over experts.
      gini: Gini index of how often each expert is used: 0 all alike, near 1 a few do it all.
      next_layer_recall_ratio: Share of a token's experts that its experts one layer below predict,
        the pairs being counted on the first half of the requests and scored on the second.
      max_mean_load_ratio: Uses of the busiest expert over uses of the mean one.
      per_layer_reuse_ratio: `reuse_ratio` of each layer.
      per_layer_gini: `gini` of each layer.
      per_layer_next_layer_recall_ratio: Recall in layers 1, 2, ... from the layer below.
      per_layer_max_mean_load_ratio: `max_mean_load_ratio` of each layer.
    """

    reuse_ratio: float | None
    reuse_chance_ratio: float
    gini: float | None
    next_layer_recall_ratio: float | None
    max_mean_load_ratio: float | None
    per_layer_reuse_ratio: tuple[float | None, ...]
    per_layer_gini: tuple[float | None, ...]
    per_layer_next_layer_recall_ratio: tuple[float | None, ...]
    per_layer_max_mean_load_ratio: tuple[float | None, ...]


def statistics(trace: Trace) -> TraceStatistics:
    """Describes the routing of a trace.

    Recall is measured on at most 20,000 tokens, evenly spaced, and not for more than 1024 experts.
    Tokens of a trace with one request are halved instead of its requests.
    """
    counts = _expert_counts(trace)
    total = counts.sum(axis=1)
    reuse = _reuse(trace)
    gini = [_gini(layer) if layer.any() else None for layer in counts]
    load = [
        float(layer.max() * trace.num_experts / uses) if uses else None
        for layer, uses in zip(counts, total, strict=True)
    ]
    recall = _next_layer_recall(trace)
    return TraceStatistics(
        reuse_ratio=_mean(reuse),
        reuse_chance_ratio=trace.topk / trace.num_experts,
        gini=_mean(gini),
        next_layer_recall_ratio=_mean(recall),
        max_mean_load_ratio=_mean(load),
        per_layer_reuse_ratio=tuple(reuse),
        per_layer_gini=tuple(gini),
        per_layer_next_layer_recall_ratio=tuple(recall),
        per_layer_max_mean_load_ratio=tuple(load),
    )


def _expert_counts(trace: Trace) -> np.ndarray:
    """How often each expert of each layer is used: [layers, experts]."""
    counts = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    for block in _blocks(trace.experts):
        for layer in range(trace.num_layers):
            used = block[:, layer][block[:, layer] < trace.num_experts]
            counts[layer] += np.bincount(used, minlength=trace.num_experts)
    return counts


def _reuse(trace: Trace) -> list[float | None]:
    """Per layer, the share of demanded experts that the token before demanded too."""
    is_first = np.zeros(trace.num_tokens, bool)
    is_first[trace.request_start[:-1][np.diff(trace.request_start) > 0]] = True
    num_reused = np.zeros(trace.num_layers, np.int64)
    num_demands = np.zeros(trace.num_layers, np.int64)
    rows = max(1, _BLOCK_IDS // (trace.num_layers * trace.topk))
    for start in range(1, trace.num_tokens, rows):
        stop = min(start + rows, trace.num_tokens)
        follows = ~is_first[start:stop]
        now = trace.experts[start:stop][follows]
        before = trace.experts[start - 1 : stop - 1][follows]
        is_demand = now < trace.num_experts
        # A token after one that was not computed has nothing to be compared with.
        is_demand &= np.any(before < trace.num_experts, axis=2, keepdims=True)
        is_reused = np.zeros(now.shape, bool)
        for rank in range(trace.topk):
            is_reused |= now == before[:, :, rank, None]
        num_reused += (is_reused & is_demand).sum(axis=(0, 2))
        num_demands += is_demand.sum(axis=(0, 2))
    return [
        float(reused / demands) if demands else None
        for reused, demands in zip(num_reused, num_demands, strict=True)
    ]


def _gini(counts: np.ndarray) -> float:
    """Gini index of non-negative counts that are not all zero."""
    ranked = np.sort(counts).astype(np.float64)
    rank = np.arange(1, ranked.size + 1)
    return float((2 * rank - ranked.size - 1) @ ranked / (ranked.size * ranked.sum()))


def _next_layer_recall(trace: Trace) -> list[float | None]:
    num_pairs = trace.num_layers - 1
    if trace.num_experts > _MAX_RECALL_EXPERTS or trace.num_tokens < 2:
        return [None] * num_pairs
    if trace.num_requests > 1:
        middle = int(trace.request_start[(trace.num_requests + 1) // 2])
    else:
        middle = trace.num_tokens // 2
    if not 0 < middle < trace.num_tokens:
        middle = trace.num_tokens // 2
    learn = _evenly(trace.experts[:middle])
    test = _evenly(trace.experts[middle:])
    recall = []
    below_learn, below_test = (_one_hot(part[:, 0], trace.num_experts) for part in (learn, test))
    for layer in range(1, trace.num_layers):
        here_learn, here_test = (
            _one_hot(part[:, layer], trace.num_experts) for part in (learn, test)
        )
        recall.append(_recall(below_learn, here_learn, below_test, here_test, trace.topk))
        below_learn, below_test = here_learn, here_test
    return recall


def _recall(
    below_learn: np.ndarray,
    here_learn: np.ndarray,
    below_test: np.ndarray,
    here_test: np.ndarray,
    topk: int,
) -> float | None:
    """Experts of a layer predicted by summed P(expert here | expert below) over those below."""
    num_uses = np.maximum(below_learn.sum(axis=0), 1)
    probability = below_learn.T @ here_learn / num_uses[:, None]
    is_computed = below_test.any(axis=1) & here_test.any(axis=1)
    score = below_test[is_computed] @ probability
    demanded = here_test[is_computed]
    if not demanded.size:
        return None
    best = np.argpartition(score, -topk, axis=1)[:, -topk:]
    return float(np.take_along_axis(demanded, best, axis=1).sum() / demanded.sum())


def _one_hot(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """[tokens, experts] of 0 and 1; all 0 for a token that was not computed."""
    hot = np.zeros((experts.shape[0], num_experts + 1), np.float32)
    hot[np.arange(experts.shape[0])[:, None], known_ids(experts, num_experts)] = 1
    return hot[:, :num_experts]


def _evenly(experts: np.ndarray) -> np.ndarray:
    most = _MAX_RECALL_TOKENS // 2
    if experts.shape[0] <= most:
        return experts
    return experts[np.linspace(0, experts.shape[0] - 1, most).astype(np.int64)]


def _blocks(experts: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_IDS // experts[:1].size)
    for start in range(0, experts.shape[0], rows):
        yield experts[start : start + rows]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
