"""What the report on the small models says of a recording: ours and other people's alike."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from record_model import describe_domains

from moejax.errors import MoejaxError
from moejax.results import to_plain
from moejax.trace import Trace, import_trace, load_trace, select_requests, statistics
from moejax.workloads import first_touch_ratio, lru_hit_ratio, oracle_hit_ratio

MAX_HIT_REQUESTS = 100
MAX_HIT_TOKENS = 512
ORACLE_SLOTS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 30, 36, 45, 52, 56)

# What to call a recording of this file name, what its texts are, and where it is from.
RECORDINGS = {
    "deepseek-v2-lite_esft_4domains": (
        "DeepSeek-V2-Lite",
        "four narrow tasks, texts read, not written",
        "`deepseek-ai/ESFT` @ 579a7711, MIT",
    ),
    "gpt-oss-20b_decode_ids": (
        "gpt-oss-20b",
        "generated, without texts that repeat themselves",
        "`AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting` @ 72b368f6, Apache-2.0",
    ),
    "qwen3-30b-a3b_bigmoe-edge_top6": (
        "Qwen3-30B-A3B, top-6 instead of 8",
        "one short text",
        "`Helldez/BigMoeOnEdge`, Apache-2.0",
    ),
    "gemma-4-26b-a4b_bigmoe-edge_top6": (
        "Gemma-4-26B-A4B, top-6",
        "one short text",
        "`Helldez/BigMoeOnEdge`, Apache-2.0",
    ),
    "gpt-oss-120b_bigmoe-edge_top2": (
        "gpt-oss-120b, top-2 instead of 4",
        "one short text",
        "`Helldez/BigMoeOnEdge`, Apache-2.0",
    ),
}


def describe_own(name: str) -> dict[str, Any]:
    """A trace that comes with moejax: statistics, hit curves, and what gates see ahead by layer."""
    trace = load_trace(name)
    found = describe(trace)
    slots = [slot for slot in ORACLE_SLOTS if slot < trace.num_experts]
    texts = complete_texts(trace)
    return {
        **found,
        "lru_hit_ratio_warm": dict(
            enumerate(hit_ratio_warm(texts, trace.num_experts, None).tolist())
        ),
        "oracle_hit_ratio_warm": dict(
            zip(slots, hit_ratio_warm(texts, trace.num_experts, slots).tolist(), strict=True)
        ),
        "per_layer_lookahead_recall_ratio": {
            str(ahead): recall_ahead(trace, ahead).tolist()
            for ahead in range(1, (0 if trace.lookahead is None else trace.lookahead.shape[2]) + 1)
        },
    }


def describe_recordings(folder: Path) -> dict[str, dict[str, Any]]:
    """Every recording in a folder, by the code that describes ours.

    Texts that a recording marks as repeating themselves are left out: their reuse is no sign of
    the router. Where it labels its texts, dependence on the label is measured as on our domains.
    """
    found = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            trace = import_trace(path)
        except MoejaxError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        with np.load(path) as arrays:
            labels = None
            if "names" in arrays:
                labels = np.array([name.partition("/")[0] for name in arrays["names"]])
            elif "dataset" in arrays:
                labels = arrays["dataset"]
            kept = np.arange(trace.num_requests)
            if "has_repetition" in arrays:
                kept = np.flatnonzero(~arrays["has_repetition"])
        if labels is not None:
            kept = kept[np.argsort(labels[kept], kind="stable")]
            labels = labels[kept]
        trace = select_requests(trace, kept)
        described = describe(trace)
        if labels is not None:
            domains = to_plain(describe_domains(trace, count_in_order(labels)))
            described["domains"] = {k: v for k, v in domains.items() if k != "distance"}
        found[path.stem] = described
    return found


def describe(trace: Trace) -> dict[str, Any]:
    """Shape and statistics of a trace, and hits at twice top-k and at half of the experts.

    Next-layer recall counts pairs of experts on one half of the texts and is measured on the
    other. Here every other text goes to each half, so that both have all domains; the recall with
    the order of the trace is given as well.
    """
    number = np.arange(trace.num_requests)
    mixed = select_requests(trace, np.concatenate([number[::2], number[1::2]]))
    in_order = statistics(trace).next_layer_recall_ratio
    texts = complete_texts(trace)
    slots = [2 * trace.topk, trace.num_experts // 2]
    lru = hit_ratio_warm(texts, trace.num_experts, None)[slots]
    oracle = hit_ratio_warm(texts, trace.num_experts, slots)
    return {
        "shape": f"{trace.num_layers} x {trace.num_experts}, top-{trace.topk}",
        "num_tokens": trace.num_tokens,
        "num_requests": trace.num_requests,
        **to_plain(statistics(mixed)),
        "in_order_next_layer_recall_ratio": in_order,
        "slots": slots,
        "slots_share_ratio": [slot / trace.num_experts for slot in slots],
        "lru_ratio": lru.tolist(),
        "oracle_ratio": oracle.tolist(),
    }


def complete_texts(trace: Trace) -> list[Shaped[np.ndarray, "1 tokens layers topk"]]:
    """The first tokens of texts, evenly chosen; tokens that lack an expert are left out."""
    chosen = np.arange(trace.num_requests)
    if chosen.size > MAX_HIT_REQUESTS:
        chosen = np.linspace(0, chosen.size - 1, MAX_HIT_REQUESTS).astype(int)
    texts = []
    for request in chosen:
        experts = trace.experts[slice(*trace.request_start[request : request + 2])]
        is_whole = (experts < trace.num_experts).all(axis=(1, 2))
        texts.append(experts[is_whole][None, :MAX_HIT_TOKENS])
    return [text for text in texts if text.size]


def hit_ratio_warm(
    texts: list[Shaped[np.ndarray, "1 tokens layers topk"]],
    num_experts: int,
    oracle_slots: list[int] | None,
) -> Float[np.ndarray, " slots"]:
    """Hit ratio of per-layer caches, one text at a time from an empty cache.

    A first touch counts as a hit while a slot is free, as it does in the published curves.

    Args:
      texts: Experts of each text.
      num_experts: Experts of a layer.
      oracle_slots: Sizes at which to keep what is needed soonest (Belady); None for least
        recently used at 0 to `num_experts` slots.
    """
    ratios = []
    for text in texts:
        first_touch = first_touch_ratio(text, num_experts)
        if oracle_slots is None:
            ratios.append(lru_hit_ratio(text, num_experts) + first_touch)
        else:
            hits = oracle_hit_ratio(text, num_experts, tuple(oracle_slots))
            ratios.append(hits + first_touch[oracle_slots])
    return np.average(ratios, axis=0, weights=[text.size for text in texts])


def recall_ahead(trace: Trace, ahead: int) -> Float[np.ndarray, " layers"]:
    """Share of each layer's experts among its gate's first choices some layers before.

    The first entry is that of layer `ahead`.
    """
    assert trace.lookahead is not None
    demanded = trace.experts[:, ahead:]
    named = trace.lookahead[:, : trace.num_layers - ahead, ahead - 1, : trace.topk]
    return (demanded[..., :, None] == named[..., None, :]).any(-1).mean(axis=(0, 2))


def count_in_order(labels: Shaped[np.ndarray, " texts"]) -> dict[str, int]:
    """How many texts each label has, in the order in which labels appear."""
    names, first, counts = np.unique(labels, return_index=True, return_counts=True)
    return {str(names[at]): int(counts[at]) for at in np.argsort(first)}
